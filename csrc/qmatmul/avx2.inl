// All of the 256-bit levels but their products of bytes. Blocks of the panel are unpacked to bytes and multiplied by
// tiles of 4 tokens x 16 output features; zero points times the activations' sum is where the accumulators start.
// Included inside the anonymous namespace of a file *_<level>.cpp; needs AVX2, FMA and F16C. Before it, such a file
// defines ProductsOf<bits>, a class of static members:
//   takes_signed_bytes   whether 8-bit weights are unpacked to code - 128 instead of to the code
//   quads                how many products of four features are summed before they join the accumulator
//   begin(dot), add(sum, weights, a), end(dot, sum)   such a sum; dot is the accumulator

using Vec = __m256;
using Index = __m256i;

INLINE Vec broadcast(float v) { return _mm256_set1_ps(v); }
INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
INLINE Vec divide(Vec a, Vec b) { return _mm256_div_ps(a, b); }
INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Vec absolute(Vec v) { return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }
INLINE Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
INLINE Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
INLINE Index truncate(Vec v) { return _mm256_cvttps_epi32(v); }
INLINE Vec widen(Index i) { return _mm256_cvtepi32_ps(i); }
INLINE Vec power_of_two(Index i) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(i, _mm256_set1_epi32(127)), 23));
}
INLINE Vec look_up(const float* table, Index i) { return _mm256_i32gather_ps(table, i, 4); }

#include "qmatmul/epilogue.inl"

// ---- element types --------------------------------------------------------------------------------------------------

constexpr int64_t lanes = 8;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

INLINE __m128i load_halves(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
INLINE __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
INLINE __m256 load8(const BFloat16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p)), 16));
}
INLINE __m256 load8(const Float16* p) { return _mm256_cvtph_ps(load_halves(p)); }

// The first `count` elements, then zeros.
template <class T>
INLINE __m256 load8(const T* p, int64_t count) {
  if (count >= lanes) return load8(p);
  T padded[lanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load8(padded);
}

INLINE void store8(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
INLINE void store8(BFloat16* p, __m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i halves = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
INLINE void store8(Float16* p, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

template <class T>
INLINE void store8(T* p, int64_t count, __m256 v) {
  if (count >= lanes) return store8(p, v);
  T all[lanes];
  store8(all, v);
  for (int64_t i = 0; i < count; ++i) p[i] = all[i];
}

// ---- activations ----------------------------------------------------------------------------------------------------

INLINE int32_t reduce_max(__m256i v) {
  int32_t at[lanes];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), v);
  int32_t largest = at[0];
  for (int i = 1; i < lanes; ++i) largest = at[i] > largest ? at[i] : largest;
  return largest;
}

INLINE int32_t reduce_add(__m256i v) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

template <class T>
void quantize_as(const T* x, int64_t in_features, int8_t* codes, int64_t stride, float* scale) {
  // As integers, magnitudes compare as floats do, with infinity and NaN above every number.
  __m256i largest = _mm256_castps_si256(_mm256_set1_ps(smallest_amax));
  for (int64_t k = 0; k < in_features; k += lanes) {
    largest = _mm256_max_epi32(largest, _mm256_castps_si256(absolute(load8(x + k, in_features - k))));
  }
  const float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(reduce_max(largest))));
  const bool finite = amax - amax == 0;
  *scale = finite ? amax * (1.f / 127.f) : amax - amax;
  const __m256 inverse = _mm256_set1_ps(127.f / amax);
  const __m256i used = _mm256_set1_epi32(finite ? -1 : 0);
  for (int64_t k = 0; k < in_features; k += lanes) {
    const __m256 scaled = _mm256_mul_ps(load8(x + k, in_features - k), inverse);
    const __m256i code = _mm256_and_si256(_mm256_cvtps_epi32(scaled), used);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + k), _mm_packs_epi16(words, words));
  }
  for (int64_t k = (in_features + lanes - 1) / lanes * lanes; k < stride; k += lanes) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + k), _mm_setzero_si128());
  }
}

void quantize(const void* x, DType dtype, int64_t in_features, int8_t* codes, int64_t stride, float* scale) {
  if (dtype == DType::f32) {
    quantize_as(static_cast<const float*>(x), in_features, codes, stride, scale);
  } else if (dtype == DType::bf16) {
    quantize_as(static_cast<const BFloat16*>(x), in_features, codes, stride, scale);
  } else {
    quantize_as(static_cast<const Float16*>(x), in_features, codes, stride, scale);
  }
}

// Codes are zero from in_features on, and groups are multiples of 16.
void sum_groups(const int8_t* codes, int64_t in_features, int64_t group_size, int32_t* sums) {
  for (int64_t first = 0; first < in_features; first += group_size) {
    const int64_t end = first + group_size < in_features ? first + group_size : in_features;
    __m256i sum = _mm256_setzero_si256();
    for (int64_t k = first; k < end; k += 16) {
      const __m256i words = _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(codes + k)));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
    }
    *sums++ = reduce_add(sum);
  }
}

// ---- outputs --------------------------------------------------------------------------------------------------------

INLINE __m256 load8(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::f32) return load8(static_cast<const float*>(data) + index);
  if (dtype == DType::f16) return load8(static_cast<const Float16*>(data) + index);
  return load8(static_cast<const BFloat16*>(data) + index);
}

// The sums of some tokens: [rows, width], for output features from `column` of the panel on, tokens from `row` on.
// Their scales go with them, one per token.
struct Sums {
  const float* data;
  int64_t rows;
  int64_t width;
  int64_t row;
  int64_t column;
};

template <Epilogue epilogue, class T>
void finish_as(const Sums& sums, const float* scales, const Output& output) {
  for (int64_t i = 0; i < sums.width; i += lanes) {
    const int64_t column = sums.column + i, count = output.columns - column;
    const __m256 bias = _mm256_load_ps(output.bias + column);
    for (int64_t r = 0; r < sums.rows; ++r) {
      const int64_t index = (sums.row + r) * output.row_stride + column;
      __m256 y = multiply_add(_mm256_load_ps(sums.data + r * sums.width + i), broadcast(scales[r]), bias);
      y = apply_epilogue<epilogue>(y, output.gate);
      if (output.residual != nullptr)
        y = _mm256_add_ps(y, load8(static_cast<const T*>(output.residual) + index, count));
      store8(static_cast<T*>(output.data) + index, count, y);
    }
  }
}

template <Epilogue epilogue>
void finish_with(const Sums& sums, const float* scales, const Output& output) {
  if (output.dtype == DType::f32) return finish_as<epilogue, float>(sums, scales, output);
  if (output.dtype == DType::f16) return finish_as<epilogue, Float16>(sums, scales, output);
  return finish_as<epilogue, BFloat16>(sums, scales, output);
}

void finish(const Sums& sums, const float* scales, const Output& output) {
  switch (output.epilogue) {
    case Epilogue::none:
      return finish_with<Epilogue::none>(sums, scales, output);
    case Epilogue::relu:
      return finish_with<Epilogue::relu>(sums, scales, output);
    case Epilogue::silu:
      return finish_with<Epilogue::silu>(sums, scales, output);
    default:
      return finish_with<Epilogue::gelu>(sums, scales, output);
  }
}

// ---- codes ----------------------------------------------------------------------------------------------------------

constexpr int tile_rows = 4;
constexpr int tile_vectors = 2;  // of 8 output features
constexpr int64_t block_columns = tile_vectors * lanes;
static_assert(block_columns == tile_width, "a block's tiles follow each other at the stride of a panel's quads");

#include "qmatmul/blocked.inl"

INLINE __m256 load_scales(const Panel& panel, int64_t group, int64_t column) {
  return load8(panel.steps.scales, panel.steps.dtype, group * panel_width + column);
}

// The integers that come off the codes.
INLINE __m256i load_zeros(const Panel& panel, int64_t group, int64_t column) {
  if (panel.steps.kind != Zeros::codes) return _mm256_set1_epi32(panel.midpoint());
  const uint8_t* zeros = static_cast<const uint8_t*>(panel.steps.zeros) + group * panel_width + column;
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros)));
}

// The whole zero points.
INLINE __m256 load_zero_points(const Panel& panel, int64_t group, int64_t column) {
  if (panel.steps.kind == Zeros::fractional) {
    return load8(panel.steps.zeros, panel.steps.dtype, group * panel_width + column);
  }
  return panel.is_shifted() ? broadcast(0.5f) : widen(load_zeros(panel, group, column));
}

// Eight codes of some bits to eight bytes, by halving the fields three times; four words at once.
class Unpacker {
 public:
  explicit INLINE Unpacker(const Panel& panel) : bits_(panel.bits), end_(panel.codes + panel.quads * 32 * bits_) {
    const uint64_t fields = (uint64_t{1} << bits_) - 1;
    const uint64_t pairs = fields | fields << bits_;
    const uint64_t low[] = {pairs | pairs << 2 * bits_, pairs * 0x0000000100000001, fields * 0x0001000100010001};
    for (int step = 0, width = 32; step < 3; ++step, width /= 2) {
      low_[step] = _mm256_set1_epi64x(static_cast<int64_t>(low[step]));
      high_[step] = _mm256_sll_epi64(low_[step], _mm_cvtsi32_si128(width));
      moves_[step] = _mm_cvtsi32_si128((8 - bits_) * width / 8);
    }
  }

  // 8 output features by 4 input features from 4 words on.
  INLINE __m256i operator()(const uint8_t* from) const {
    if (bits_ == 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if (bits_ == 4) {
      const __m256i pairs = _mm256_cvtepu8_epi16(load_halves(from));
      const __m256i both = _mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4));
      return _mm256_and_si256(both, _mm256_set1_epi8(15));
    }
    uint64_t words[4] = {};
    for (uint64_t& word : words) {
      __builtin_memcpy(&word, from, end_ - from < 8 ? static_cast<size_t>(bits_) : sizeof word);
      from += bits_;
    }
    __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    for (int step = 0; step < 3; ++step) {
      const __m256i moved = _mm256_sll_epi64(v, moves_[step]);
      v = _mm256_or_si256(_mm256_and_si256(v, low_[step]), _mm256_and_si256(moved, high_[step]));
    }
    return v;
  }

 private:
  int bits_;
  const uint8_t* end_;
  __m256i low_[3], high_[3];
  __m128i moves_[3];
};

INLINE void store_bytes(uint8_t* to, __m256i bytes) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), bytes); }

INLINE bool takes_signed_bytes(const Panel& panel) { return panel.bits == 8 && ProductsOf<8>::takes_signed_bytes; }

void unpack_groups(const Panel& panel, const Block& block) {
  for (int64_t i = 0; i * panel.group_quads < block.quads; ++i) {
    const int64_t group = block.first_group + i;
    for (int64_t t = 0; t < block_columns; t += lanes) {
      const int64_t at = i * block_columns + t;
      const __m256 scales = load_scales(panel, group, block.column + t);
      const __m256i zeros = load_zeros(panel, group, block.column + t);
      _mm256_store_ps(block.scales + at, scales);
      _mm256_store_si256(reinterpret_cast<__m256i*>(block.zeros + at),
                         _mm256_sub_epi32(zeros, _mm256_set1_epi32(takes_signed_bytes(panel) ? 128 : 0)));
      const __m256 midpoint = broadcast(static_cast<float>(panel.midpoint()));
      const __m256 rest = sub(midpoint, load_zero_points(panel, group, block.column + t));
      _mm256_store_ps(block.shifts + at, mul(scales, rest));
    }
  }
}

void unpack_block(const Panel& panel, const Block& block) {
  const Unpacker unpack(panel);
  const int64_t step = 8 * panel.bits;  // bytes of a tile
  const __m256i flip = _mm256_set1_epi8(takes_signed_bytes(panel) ? -128 : 0);
  const uint8_t* tile = panel.codes + (block.first_quad * 4 + block.column / tile_width) * step;
  uint8_t* bytes = static_cast<uint8_t*>(block.weights);
  for (int64_t n = block.quads; n > 0; --n, tile += 4 * step, bytes += quad * block_columns) {
    store_bytes(bytes, _mm256_xor_si256(unpack(tile), flip));
    store_bytes(bytes + 32, _mm256_xor_si256(unpack(tile + step / 2), flip));
  }
  unpack_groups(panel, block);
}

// ---- product --------------------------------------------------------------------------------------------------------

INLINE __m256i load_quad(const int8_t* codes) {
  int32_t value;
  __builtin_memcpy(&value, codes, sizeof value);
  return _mm256_set1_epi32(value);
}

INLINE __m256i load_ints(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }

// The float sums of a tile: from memory, [Rows, block_columns], unless they begin with this block.
template <int Rows>
INLINE void begin_tile(const Block& block, const float* totals, __m256 (&total)[Rows][tile_vectors]) {
  for (int r = 0; r < Rows; ++r) {
    for (int t = 0; t < tile_vectors; ++t) {
      total[r][t] = block.first ? _mm256_setzero_ps() : _mm256_load_ps(totals + r * block_columns + t * lanes);
    }
  }
}

// Back to memory, or to where they are wanted, for the tokens from `row` on.
template <int Rows>
INLINE void end_tile(const Block& block, int64_t row, const float* scales, const __m256 (&total)[Rows][tile_vectors],
                     float* totals) {
  for (int r = 0; r < Rows; ++r) {
    for (int t = 0; t < tile_vectors; ++t) {
      if (block.plain == nullptr) {
        _mm256_store_ps(totals + r * block_columns + t * lanes, total[r][t]);
        continue;
      }
      const Output& output = *block.plain;
      const int64_t column = block.column + t * lanes;
      const __m256 y = multiply_add(total[r][t], broadcast(scales[r]), _mm256_load_ps(output.bias + column));
      float* to = static_cast<float*>(output.data) + (row + r) * output.row_stride + column;
      store8(to, output.columns - column, y);
    }
  }
}

template <int Rows, class Products>
void multiply_tile(const Panel& panel, const Block& block, const Tokens& tokens, int64_t row, float* totals) {
  __m256 total[Rows][tile_vectors];
  begin_tile(block, totals, total);
  const uint8_t* bytes = static_cast<const uint8_t*>(block.weights);
  const int8_t* quads = tokens.codes + row * tokens.stride + block.first_quad * quad;
  const int32_t* sums = tokens.sums + row * panel.groups + block.first_group;
  for (int64_t group = 0; group * panel.group_quads < block.quads; ++group) {
    block.ahead->fetch();
    const int64_t at = group * block_columns;
    __m256i dot[Rows][tile_vectors];
    for (int r = 0; r < Rows; ++r) {
      const __m256i sum = _mm256_set1_epi32(-sums[r * panel.groups + group]);
      for (int t = 0; t < tile_vectors; ++t) {
        dot[r][t] = _mm256_mullo_epi32(sum, load_ints(block.zeros + at + t * lanes));
      }
    }
    for (int64_t left = panel.quads_in(block.first_group + group); left > 0; left -= Products::quads) {
      const int count = left < Products::quads ? static_cast<int>(left) : Products::quads;
      __m256i sum[Rows][tile_vectors];
      for (int r = 0; r < Rows; ++r) {
        const __m256i a = load_quad(quads + r * tokens.stride);
        for (int t = 0; t < tile_vectors; ++t) {
          sum[r][t] = Products::add(Products::begin(dot[r][t]), load_ints(bytes + t * 32), a);
        }
      }
      for (int q = 1; q < count; ++q) {
        for (int r = 0; r < Rows; ++r) {
          const __m256i a = load_quad(quads + r * tokens.stride + q * quad);
          for (int t = 0; t < tile_vectors; ++t) {
            sum[r][t] = Products::add(sum[r][t], load_ints(bytes + q * quad * block_columns + t * 32), a);
          }
        }
      }
      for (int r = 0; r < Rows; ++r) {
        for (int t = 0; t < tile_vectors; ++t) dot[r][t] = Products::end(dot[r][t], sum[r][t]);
      }
      bytes += count * quad * block_columns;
      quads += count * quad;
    }
    for (int t = 0; t < tile_vectors; ++t) {
      const __m256 scales = _mm256_load_ps(block.scales + at + t * lanes);
      for (int r = 0; r < Rows; ++r) total[r][t] = multiply_add(_mm256_cvtepi32_ps(dot[r][t]), scales, total[r][t]);
      if (!panel.is_shifted()) continue;
      const __m256 shifts = _mm256_load_ps(block.shifts + at + t * lanes);
      for (int r = 0; r < Rows; ++r) {
        const float sum = static_cast<float>(sums[r * panel.groups + group]);
        total[r][t] = multiply_add(broadcast(sum), shifts, total[r][t]);
      }
    }
  }
  end_tile(block, row, tokens.scales + row, total, totals);
}

template <class Products>
constexpr MultiplyTile<Tokens> multiply_tile_of[tile_rows + 1] = {
    nullptr, multiply_tile<1, Products>, multiply_tile<2, Products>, multiply_tile<3, Products>,
    multiply_tile<4, Products>};

void multiply(const Panel& panel, const Tokens& tokens, const Output& output, void* scratch) {
  constexpr const MultiplyTile<Tokens>* of_bits[] = {nullptr,
                                                     multiply_tile_of<ProductsOf<1>>,
                                                     multiply_tile_of<ProductsOf<2>>,
                                                     multiply_tile_of<ProductsOf<3>>,
                                                     multiply_tile_of<ProductsOf<4>>,
                                                     multiply_tile_of<ProductsOf<5>>,
                                                     multiply_tile_of<ProductsOf<6>>,
                                                     multiply_tile_of<ProductsOf<7>>,
                                                     multiply_tile_of<ProductsOf<8>>};
  multiply_blocks(panel, tokens, output, scratch, cut_by_groups(panel, 1), unpack_block, of_bits[panel.bits]);
}

int64_t scratch_bytes(const Panel& panel, int64_t rows) { return scratch_bytes(panel, rows, cut_by_groups(panel, 1)); }

// ---- in floats ------------------------------------------------------------------------------------------------------

template <class T>
void widen_as(const T* x, int64_t in_features, float* values, int64_t stride) {
  int64_t k = 0;
  for (; k < in_features; k += lanes) _mm256_store_ps(values + k, load8(x + k, in_features - k));
  for (; k < stride; k += lanes) _mm256_store_ps(values + k, _mm256_setzero_ps());
}

void widen(const void* x, DType dtype, int64_t in_features, float* values, int64_t stride) {
  if (dtype == DType::f32) return widen_as(static_cast<const float*>(x), in_features, values, stride);
  if (dtype == DType::f16) return widen_as(static_cast<const Float16*>(x), in_features, values, stride);
  widen_as(static_cast<const BFloat16*>(x), in_features, values, stride);
}

void unpack_floats(const Panel& panel, const Block& block) {
  const Unpacker unpack(panel);
  const int64_t step = 8 * panel.bits;
  const uint8_t* tile = panel.codes + (block.first_quad * 4 + block.column / tile_width) * step;
  float* to = static_cast<float*>(block.weights);
  for (int64_t q = block.first_quad; q < block.first_quad + block.quads; ++q) {
    const int64_t group = q / panel.group_quads;
    for (int64_t t = 0; t < tile_vectors; ++t) {
      const __m256 scales = load_scales(panel, group, block.column + t * lanes);
      const __m256 zeros = load_zero_points(panel, group, block.column + t * lanes);
      const __m256i codes = unpack(tile + t * step / 2);
      for (int k = 0; k < quad; ++k) {
        const __m256i code = _mm256_and_si256(_mm256_srli_epi32(codes, 8 * k), _mm256_set1_epi32(0xff));
        _mm256_store_ps(to + k * block_columns + t * lanes, mul(scales, sub(widen(code), zeros)));
      }
    }
    tile += 4 * step;
    to += quad * block_columns;
  }
}

// A block's products are summed on their own before they join the sums, which keeps rounding errors low in long rows.
template <int Rows>
void multiply_float_tile(const Panel&, const Block& block, const FloatTokens& tokens, int64_t row, float* totals) {
  block.ahead->fetch();
  __m256 sum[Rows][tile_vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int t = 0; t < tile_vectors; ++t) sum[r][t] = _mm256_setzero_ps();
  }
  const float* w = static_cast<const float*>(block.weights);
  const float* x = tokens.values + row * tokens.stride + block.first_quad * quad;
  for (int64_t n = block.quads * quad; n > 0; --n, ++x, w += block_columns) {
    for (int r = 0; r < Rows; ++r) {
      const __m256 a = broadcast(x[r * tokens.stride]);
      for (int t = 0; t < tile_vectors; ++t) sum[r][t] = multiply_add(a, _mm256_load_ps(w + t * lanes), sum[r][t]);
    }
  }
  __m256 total[Rows][tile_vectors];
  begin_tile(block, totals, total);
  for (int r = 0; r < Rows; ++r) {
    for (int t = 0; t < tile_vectors; ++t) total[r][t] = _mm256_add_ps(total[r][t], sum[r][t]);
  }
  end_tile(block, row, scales_of(tokens, row), total, totals);
}

constexpr MultiplyTile<FloatTokens> multiply_float_tile_of[tile_rows + 1] = {
    nullptr, multiply_float_tile<1>, multiply_float_tile<2>, multiply_float_tile<3>, multiply_float_tile<4>};

void multiply_float(const Panel& panel, const FloatTokens& tokens, const Output& output, void* scratch) {
  multiply_blocks(panel, tokens, output, scratch, cut_evenly(panel, sizeof(float)), unpack_floats,
                  multiply_float_tile_of);
}

int64_t float_scratch_bytes(const Panel& panel, int64_t rows) {
  return scratch_bytes(panel, rows, cut_evenly(panel, sizeof(float)));
}
