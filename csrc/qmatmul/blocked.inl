// Many tokens times one panel, block by block. A file *_<level>.cpp includes this inside its own anonymous namespace,
// after defining block_columns (output features of a block), tile_rows (most tokens of a tile) and `finish`.
//
// A block is as many input features as some kilobytes hold, by block_columns output features. It is unpacked once, into
// memory that then stays in the nearest caches, and multiplied with all tokens, a tile of tokens at a time.
// From block to block the float sums wait in memory.

constexpr int64_t block_bytes = block_columns * 1024;

// Fetches what lies ahead of the work, a little at a time.
struct Ahead {
  const uint8_t* at;
  int64_t left;
  int64_t step;

  inline __attribute__((always_inline)) Ahead(const uint8_t* from, int64_t bytes, int64_t steps)
      : at(from), left(from == nullptr ? 0 : bytes), step((bytes / steps + 64) / 64 * 64) {}

  inline __attribute__((always_inline)) void fetch() {
    for (const uint8_t* end = at + (left < step ? left : step); at < end; at += 64, left -= 64) {
      __builtin_prefetch(at, 0, 2);
    }
  }
};

struct Block {
  void* weights;  // as the level wants them
  // Where the arithmetic and the level need them.
  float* scales;         // [groups, block_columns]
  int32_t* zeros;        // [groups, block_columns]
  int32_t* upper_zeros;  // [groups, block_columns], their upper four bits
  float* shifts;         // [groups, block_columns]
  int64_t column;        // the first of its output features within the panel
  int64_t first_quad;
  int64_t first_group;
  int64_t quads;
  bool first;           // of its band: sums begin with it, at zero
  Ahead* ahead;         // to be asked by a tile once per group, or once where blocks are cut evenly
  const Output* plain;  // where sums that are whole with this block go at once, needing but scale and bias; or null
};

struct Cut {
  int64_t quads;
  int64_t groups;
  int64_t bytes_per_weight;
};

// Into blocks of whole groups, whose products are summed before they are scaled.
inline Cut cut_by_groups(const Panel& panel, int64_t bytes_per_weight) {
  const int64_t fitting = block_bytes / (quad * block_columns * bytes_per_weight) / panel.group_quads;
  const int64_t groups = fitting < 1 ? 1 : fitting < panel.groups ? fitting : panel.groups;
  const int64_t quads = groups * panel.group_quads;
  return {quads < panel.quads ? quads : panel.quads, groups, bytes_per_weight};
}

// Into blocks of one size, for weights that have their scales in them. Every level sums over as many features, which
// the results depend on.
inline Cut cut_evenly(const Panel& panel, int64_t bytes_per_weight) {
  constexpr int64_t quads = 32;
  return {quads < panel.quads ? quads : panel.quads, 0, bytes_per_weight};
}

// How many tokens have sums waiting: all, or those of one tile where one block is the whole of them.
inline int64_t rows_waiting(const Panel& panel, int64_t rows, const Cut& cut) {
  return cut.quads < panel.quads ? rows : tile_rows;
}

inline int64_t scratch_bytes(const Panel& panel, int64_t rows, const Cut& cut) {
  const int64_t per_group = 2 * sizeof(float) + 2 * sizeof(int32_t);
  const int64_t per_column = cut.quads * quad * cut.bytes_per_weight + cut.groups * per_group +
                             rows_waiting(panel, rows, cut) * static_cast<int64_t>(sizeof(float));
  return per_column * block_columns;
}

// Has the lines that some tokens' outputs will be written to fetched, to be there when the tile is done.
inline __attribute__((always_inline)) void prefetch_outputs(const Output& output, int64_t column, int64_t row,
                                                            int64_t rows) {
  const int64_t element = output.dtype == DType::f32 ? 4 : 2;
  char* at = static_cast<char*>(output.data) + (row * output.row_stride + column) * element;
  for (int64_t r = 0; r < rows; ++r, at += output.row_stride * element) {
    for (int64_t byte = 0; byte < block_columns * element; byte += 64) __builtin_prefetch(at + byte, 1);
  }
}

inline const float* scales_of(const Tokens& tokens, int64_t row) { return tokens.scales + row; }
template <class Rows>
const float* scales_of(const Rows&, int64_t) {
  static constexpr float ones[] = {1, 1, 1, 1, 1, 1};
  static_assert(tile_rows <= sizeof ones / sizeof *ones, "a scale per token of a tile");
  return ones;
}

using UnpackBlock = void (*)(const Panel&, const Block&);
// Adds a block's products to the sums [rows, block_columns] of the tokens from `row` on, or has them where
// `block.plain` says.
template <class Rows>
using MultiplyTile = void (*)(const Panel&, const Block&, const Rows&, int64_t row, float* totals);

// `multiply_tile_of` has a function per number of tokens; so may `unpack_and_multiply_of`, for some of them, whose
// functions take the place of unpacking and multiplying the first tile.
template <class Rows>
void multiply_blocks(const Panel& panel, const Rows& tokens, const Output& output, void* scratch, const Cut& cut,
                     UnpackBlock unpack_block, const MultiplyTile<Rows>* multiply_tile_of,
                     const MultiplyTile<Rows>* unpack_and_multiply_of = nullptr) {
  Block block;
  block.weights = scratch;
  block.scales = static_cast<float*>(scratch) + cut.quads * block_columns * cut.bytes_per_weight;
  block.zeros = reinterpret_cast<int32_t*>(block.scales + cut.groups * block_columns);
  block.upper_zeros = block.zeros + cut.groups * block_columns;
  block.shifts = reinterpret_cast<float*>(block.upper_zeros + cut.groups * block_columns);
  float* totals = block.shifts + cut.groups * block_columns;
  const bool waiting = cut.quads < panel.quads;
  const bool plain = output.dtype == DType::f32 && output.epilogue == Epilogue::none && output.residual == nullptr;
  // Tiles of equal height, as nearly as may be: a low one would wait for its few sums.
  const int64_t tiles = (tokens.rows + tile_rows - 1) / tile_rows;
  const int64_t height = tokens.rows / tiles, higher = tokens.rows % tiles;
  const int64_t first_height = height + (higher > 0 ? 1 : 0);
  const MultiplyTile<Rows> multiply_first =
      unpack_and_multiply_of == nullptr ? nullptr : unpack_and_multiply_of[first_height];
  const int64_t bands = (output.columns + block_columns - 1) / block_columns;
  const int64_t blocks = panel.quads == 0 ? 1 : (panel.quads + cut.quads - 1) / cut.quads;
  const int64_t steps = bands * tiles * (cut.groups == 0 ? blocks : panel.groups);
  Ahead ahead(panel.next_codes, panel.quads * 32 * panel.bits, steps < 1 ? 1 : steps);
  block.ahead = &ahead;
  for (block.column = 0; block.column < output.columns; block.column += block_columns) {
    for (int64_t i = 0; i < blocks; ++i) {
      const bool last = i + 1 == blocks;
      block.first_quad = i * cut.quads;
      block.first_group = i * cut.groups;
      block.quads = last ? panel.quads - block.first_quad : cut.quads;
      block.first = i == 0;
      block.plain = last && plain ? &output : nullptr;
      if (multiply_first == nullptr) unpack_block(panel, block);
      for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
        const int64_t rows = height + (tile < higher ? 1 : 0);
        float* sums = totals + (waiting ? row * block_columns : 0);
        if (last) prefetch_outputs(output, block.column, row, rows);
        (tile == 0 && multiply_first != nullptr ? multiply_first : multiply_tile_of[rows])(panel, block, tokens, row,
                                                                                           sums);
        if (last && !plain) finish({sums, rows, block_columns, row, block.column}, scales_of(tokens, row), output);
        row += rows;
      }
    }
  }
}
