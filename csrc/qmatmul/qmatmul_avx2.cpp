// AVX2: the panel is unpacked once to bytes and multiplied by tiles of 4 tokens x 16 output features. vpmaddubsw adds
// two products of an unsigned and a signed byte in 16 bits, saturating, so the unsigned ones must stay within 128:
//   up to 7 bits   code times activation: at most 2 * 127 * 127;
//   8 bits         |code - 128| times the activation with the sign of code - 128: at most 2 * 128 * 127.
// Zero points (less 128 for 8 bits) times the activations' sum is where the accumulators start.
#include <immintrin.h>

#include "qmatmul/kernels.hpp"

namespace fastembed::qmatmul {
namespace avx2 {
namespace {

using Vec = __m256;
using Index = __m256i;

#define INLINE inline __attribute__((always_inline))

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

// ---- codes ----------------------------------------------------------------------------------------------------------

#include "qmatmul/unpacked.inl"

INLINE __m256 load8(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::f32) return load8(static_cast<const float*>(data) + index);
  if (dtype == DType::f16) return load8(static_cast<const Float16*>(data) + index);
  return load8(static_cast<const BFloat16*>(data) + index);
}

INLINE void unpack_groups(const Panel& panel, const Unpacked& to) {
  const Steps& steps = panel.steps;
  const int wide = panel.bits == 8 ? 128 : 0;
  const __m256 midpoint = broadcast(static_cast<float>(panel.midpoint()));
  for (int64_t i = 0; i < panel.groups * panel_width; i += lanes) {
    const __m256 scales = load8(steps.scales, steps.dtype, i);
    _mm256_store_ps(to.scales + i, scales);
    __m256i zeros = _mm256_set1_epi32(panel.midpoint());
    if (steps.kind == Zeros::codes) {
      const uint8_t* codes = static_cast<const uint8_t*>(steps.zeros) + i;
      zeros = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(to.zeros + i), _mm256_sub_epi32(zeros, _mm256_set1_epi32(wide)));
    const bool fractional = steps.kind == Zeros::fractional;
    const __m256 own = fractional ? load8(steps.zeros, steps.dtype, i) : broadcast(0.5f);
    _mm256_store_ps(to.shifts + i, mul(scales, sub(midpoint, own)));
  }
}

INLINE void store_bytes(uint8_t* to, __m256i bytes) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), bytes); }

// 8-bit codes less 128, as signed bytes.
void unpack_bytes(const Panel& panel, const Unpacked& to) {
  for (int64_t i = 0; i < panel.quads * quad * panel_width; i += 32) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel.codes + i));
    store_bytes(to.bytes + i, _mm256_xor_si256(codes, _mm256_set1_epi8(-128)));
  }
}

void unpack_nibbles(const Panel& panel, const Unpacked& to) {
  for (int64_t i = 0; i < panel.quads * quad * panel_width; i += 32) {
    const __m256i pairs = _mm256_cvtepu8_epi16(load_halves(panel.codes + i / 2));
    const __m256i both = _mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4));
    store_bytes(to.bytes + i, _mm256_and_si256(both, _mm256_set1_epi8(15)));
  }
}

// Eight codes of `bits` bits to eight bytes, by halving the fields three times; four words at once.
void unpack_words(const Panel& panel, const Unpacked& to) {
  const int bits = panel.bits;
  const uint64_t fields = (uint64_t{1} << bits) - 1;
  const uint64_t pairs = fields | fields << bits;
  const uint64_t low[] = {pairs | pairs << 2 * bits, pairs * 0x0000000100000001, fields * 0x0001000100010001};
  const uint8_t* from = panel.codes;
  const uint8_t* end = from + panel.quads * 32 * bits;
  for (int64_t i = 0; i < panel.quads * quad * panel_width; i += 32) {
    uint64_t words[4] = {};
    for (uint64_t& word : words) {
      __builtin_memcpy(&word, from, end - from < 8 ? static_cast<size_t>(bits) : sizeof word);
      from += bits;
    }
    __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    for (int step = 0, width = 32; step < 3; ++step, width /= 2) {
      const __m256i mask = _mm256_set1_epi64x(static_cast<int64_t>(low[step]));
      const __m256i moved = _mm256_sll_epi64(v, _mm_cvtsi32_si128((8 - bits) * width / 8));
      const __m256i high = _mm256_sll_epi64(mask, _mm_cvtsi32_si128(width));
      v = _mm256_or_si256(_mm256_and_si256(v, mask), _mm256_and_si256(moved, high));
    }
    store_bytes(to.bytes + i, v);
  }
}

// ---- product --------------------------------------------------------------------------------------------------------

constexpr int tile_rows = 4;
constexpr int tile_vectors = 2;  // of 8 output features

INLINE __m256i load_quad(const int8_t* codes) {
  int32_t value;
  __builtin_memcpy(&value, codes, sizeof value);
  return _mm256_set1_epi32(value);
}

INLINE __m256i load_ints(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }

template <bool Wide>
INLINE __m256i dot_quads(__m256i sum, __m256i weights, __m256i a) {
  const __m256i pairs = Wide ? _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(a, weights))
                             : _mm256_maddubs_epi16(weights, a);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

template <class T>
INLINE void finish(__m256 total, const Tokens& tokens, int64_t row, int64_t column, const Output& output) {
  __m256 y = multiply_add(total, broadcast(tokens.scales[row]), _mm256_load_ps(output.bias + column));
  const int64_t index = row * output.row_stride + column;
  const int64_t count = output.columns - column;
  y = apply_epilogue(y, output);
  if (output.residual != nullptr) y = _mm256_add_ps(y, load8(static_cast<const T*>(output.residual) + index, count));
  store8(static_cast<T*>(output.data) + index, count, y);
}

template <int Rows, bool Wide>
void multiply_tile(const Panel& panel, const Unpacked& weights, const Tokens& tokens, int64_t row, int64_t first_column,
                   const Output& output) {
  __m256 total[Rows][tile_vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int t = 0; t < tile_vectors; ++t) total[r][t] = _mm256_setzero_ps();
  }
  const uint8_t* bytes = weights.bytes + first_column * quad;
  const int8_t* quads = tokens.codes + row * tokens.stride;
  for (int64_t group = 0; group < panel.groups; ++group) {
    const int64_t column = group * panel_width + first_column;
    __m256i dot[Rows][tile_vectors];
    for (int r = 0; r < Rows; ++r) {
      const __m256i sum = _mm256_set1_epi32(-tokens.sums[(row + r) * panel.groups + group]);
      for (int t = 0; t < tile_vectors; ++t) {
        dot[r][t] = _mm256_mullo_epi32(sum, load_ints(weights.zeros + column + t * lanes));
      }
    }
    for (int64_t n = panel.quads_in(group); n > 0; --n) {
      for (int r = 0; r < Rows; ++r) {
        const __m256i a = load_quad(quads + r * tokens.stride);
        for (int t = 0; t < tile_vectors; ++t) {
          dot[r][t] = dot_quads<Wide>(dot[r][t], load_ints(bytes + t * 32), a);
        }
      }
      bytes += quad * panel_width;
      quads += quad;
    }
    for (int t = 0; t < tile_vectors; ++t) {
      const __m256 scales = _mm256_load_ps(weights.scales + column + t * lanes);
      for (int r = 0; r < Rows; ++r) total[r][t] = multiply_add(_mm256_cvtepi32_ps(dot[r][t]), scales, total[r][t]);
      if (!panel.is_shifted()) continue;
      const __m256 shifts = _mm256_load_ps(weights.shifts + column + t * lanes);
      for (int r = 0; r < Rows; ++r) {
        const float sum = static_cast<float>(tokens.sums[(row + r) * panel.groups + group]);
        total[r][t] = multiply_add(broadcast(sum), shifts, total[r][t]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int t = 0; t < tile_vectors; ++t) {
      const int64_t column = first_column + t * lanes;
      if (output.dtype == DType::f32) {
        finish<float>(total[r][t], tokens, row + r, column, output);
      } else if (output.dtype == DType::bf16) {
        finish<BFloat16>(total[r][t], tokens, row + r, column, output);
      } else {
        finish<Float16>(total[r][t], tokens, row + r, column, output);
      }
    }
  }
}

using MultiplyTile = void (*)(const Panel&, const Unpacked&, const Tokens&, int64_t, int64_t, const Output&);
template <bool Wide>
constexpr MultiplyTile multiply_tile_of[tile_rows + 1] = {nullptr, multiply_tile<1, Wide>, multiply_tile<2, Wide>,
                                                          multiply_tile<3, Wide>, multiply_tile<4, Wide>};

void multiply(const Panel& panel, const Tokens& tokens, const Output& output, void* scratch) {
  const Unpacked weights(panel, scratch);
  unpack_groups(panel, weights);
  const bool wide = panel.bits == 8;
  (wide ? unpack_bytes : panel.bits == 4 ? unpack_nibbles : unpack_words)(panel, weights);
  const MultiplyTile* of_rows = wide ? multiply_tile_of<true> : multiply_tile_of<false>;
  for (int64_t row = 0; row < tokens.rows; row += tile_rows) {
    const int64_t rows = tokens.rows - row < tile_rows ? tokens.rows - row : tile_rows;
    for (int64_t column = 0; column < output.columns; column += tile_vectors * lanes) {
      of_rows[rows](panel, weights, tokens, row, column, output);
    }
  }
}

}  // namespace
}  // namespace avx2

extern const Kernels avx2_kernels;
const Kernels avx2_kernels = {avx2::quantize, avx2::sum_groups, avx2::multiply, avx2::scratch_bytes};

}  // namespace fastembed::qmatmul
