// Many tokens times one panel, block by block. A file *_<level>.cpp includes this inside its own anonymous namespace,
// after defining block_columns (output features of a block) and tile_rows (most tokens of a tile).
//
// A block is as many input features as a few kilobytes hold, in whole groups, by block_columns output features. It is
// unpacked to bytes once, into memory that then stays in the first-level cache, and multiplied with all tokens, a tile
// of tokens at a time. Between the blocks of a row of blocks the float sums wait in memory; their order is that of the
// groups, whatever the blocks.

constexpr int64_t block_quads = 128;  // more where one group has more

struct Block {
  uint8_t* bytes;  // [quads, block_columns, 4 input features]
  float* scales;   // [groups, block_columns]
  // Where the panel and the level need them.
  int32_t* zeros;  // [groups, block_columns]
  float* shifts;   // [groups, block_columns]
  int64_t column;  // the first of its output features within the panel
  int64_t first_group;
  int64_t groups;
};

inline __attribute__((always_inline)) int64_t groups_per_block(const Panel& panel) {
  const int64_t fitting = block_quads / panel.group_quads;
  return fitting < 1 ? 1 : fitting < panel.groups ? fitting : panel.groups;
}

// The sums of all tokens, or of one tile where no sums have to wait.
inline __attribute__((always_inline)) int64_t rows_waiting(const Panel& panel, int64_t rows) {
  return groups_per_block(panel) < panel.groups ? rows : tile_rows;
}

int64_t scratch_bytes(const Panel& panel, int64_t rows) {
  const int64_t groups = groups_per_block(panel);
  const int64_t quads = groups * panel.group_quads < panel.quads ? groups * panel.group_quads : panel.quads;
  const int64_t per_column = quads * quad + groups * static_cast<int64_t>(2 * sizeof(float) + sizeof(int32_t)) +
                             rows_waiting(panel, rows) * static_cast<int64_t>(sizeof(float));
  return per_column * block_columns;
}

// Adds a block's products to the sums [rows, block_columns] of the tokens from `row` on.
using MultiplyTile = void (*)(const Panel&, const Block&, const Tokens&, int64_t row, float* totals);
using UnpackBlock = void (*)(const Panel&, const Block&);

// Has the lines that some tokens' outputs will be written to fetched, to be there when the tile is done.
inline __attribute__((always_inline)) void prefetch_outputs(const Output& output, const Block& block, int64_t row,
                                                            int64_t rows) {
  const int64_t element = output.dtype == DType::f32 ? 4 : 2;
  char* at = static_cast<char*>(output.data) + (row * output.row_stride + block.column) * element;
  for (int64_t r = 0; r < rows; ++r, at += output.row_stride * element) {
    for (int64_t byte = 0; byte < block_columns * element; byte += 64) __builtin_prefetch(at + byte, 1);
  }
}

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

// `multiply_tile_of` has a function per number of tokens.
inline void multiply_blocks(const Panel& panel, const Tokens& tokens, const Output& output, void* scratch,
                            UnpackBlock unpack_block, const MultiplyTile* multiply_tile_of) {
  const int64_t most_groups = groups_per_block(panel);
  const int64_t most_quads =
      most_groups * panel.group_quads < panel.quads ? most_groups * panel.group_quads : panel.quads;
  Block block;
  block.bytes = static_cast<uint8_t*>(scratch);
  block.scales = reinterpret_cast<float*>(block.bytes + most_quads * quad * block_columns);
  block.zeros = reinterpret_cast<int32_t*>(block.scales + most_groups * block_columns);
  block.shifts = reinterpret_cast<float*>(block.zeros + most_groups * block_columns);
  float* totals = block.shifts + most_groups * block_columns;
  const bool waiting = rows_waiting(panel, tokens.rows) > tile_rows;
  // Tiles of equal height, as nearly as may be: a low one would wait for its few sums.
  const int64_t tiles = (tokens.rows + tile_rows - 1) / tile_rows;
  const int64_t height = tokens.rows / tiles, higher = tokens.rows % tiles;
  const int64_t blocks =
      (output.columns + block_columns - 1) / block_columns * ((panel.groups + most_groups - 1) / most_groups);
  Ahead ahead(panel.next_codes, panel.quads * 32 * panel.bits, blocks * tiles);
  for (block.column = 0; block.column < output.columns; block.column += block_columns) {
    block.first_group = 0;
    do {
      const int64_t left = panel.groups - block.first_group;
      block.groups = left < most_groups ? left : most_groups;
      unpack_block(panel, block);
      const bool last = block.groups == left;
      for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
        const int64_t rows = height + (tile < higher ? 1 : 0);
        float* sums = totals + (waiting ? row * block_columns : 0);
        if (block.first_group == 0) __builtin_memset(sums, 0, static_cast<size_t>(rows * block_columns) * sizeof *sums);
        ahead.fetch();
        if (last) prefetch_outputs(output, block, row, rows);
        multiply_tile_of[rows](panel, block, tokens, row, sums);
        if (last) finish({sums, rows, block_columns, row, block.column}, tokens, output);
        row += rows;
      }
      block.first_group += block.groups;
    } while (block.first_group < panel.groups);
  }
}
