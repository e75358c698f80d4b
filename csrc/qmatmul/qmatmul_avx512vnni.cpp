// AVX-512 with VNNI and VBMI: unsigned weight bytes times signed activations, 64 products per instruction.
//
// Many tokens: the panel is unpacked once, to bytes that stay in the second-level cache, and multiplied by tiles of 6
// tokens x 32 output features whose integer and float accumulators both stay in registers. The unpacked byte is
// code - zero + 128, so that the zero points cost nothing: 128 times the activations' sum is the same for every output
// feature and is where the accumulators start. 8-bit codes with zero points of their own do not fit in a byte that way;
// they stay as they are, and zero times the sum comes off at the end of a group.
// Few tokens: codes are unpacked in registers, as they stream by.
// Both ways compute the same integers and then the same float operations: a token's result is the same in any batch.
#include <immintrin.h>

#include "qmatmul/kernels.hpp"

// GCC's own _mm512_undefined_* trip this warning (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace fastembed::qmatmul {
namespace avx512vnni {
namespace {

using Vec = __m512;
using Index = __m512i;

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

INLINE Vec broadcast(float v) { return _mm512_set1_ps(v); }
INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
INLINE Vec divide(Vec a, Vec b) { return _mm512_div_ps(a, b); }
INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Vec absolute(Vec v) { return _mm512_abs_ps(v); }
INLINE Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
INLINE Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
INLINE Index truncate(Vec v) { return _mm512_cvttps_epi32(v); }
INLINE Vec widen(Index i) { return _mm512_cvtepi32_ps(i); }
INLINE Vec power_of_two(Index i) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(127)), 23));
}
INLINE Vec look_up(const float* table, Index i) {
  return _mm512_permutex2var_ps(_mm512_loadu_ps(table), i, _mm512_loadu_ps(table + 16));
}

#include "qmatmul/epilogue.inl"

INLINE __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// ---- activations ----------------------------------------------------------------------------------------------------

INLINE __m512 load16(const float* p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }

struct BFloat16 {
  uint16_t bits;
};
INLINE __m512 load16(const BFloat16* p, __mmask16 lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16));
}

struct Float16 {
  uint16_t bits;
};
INLINE __m512 load16(const Float16* p, __mmask16 lanes) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p)); }

INLINE void store_codes(int8_t* codes, __m512i values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(values));
}

// Calls body(k, lanes) for the columns [first, end) by 16: whole vectors with a constant mask, then the rest.
template <class Body>
INLINE void by_vectors(int64_t first, int64_t end, const Body& body) {
  int64_t k = first;
  for (; k + 16 <= end; k += 16) body(k, static_cast<__mmask16>(0xffff));
  if (k < end) body(k, first_lanes(end - k));
}

template <class T>
void quantize_as(const T* x, int64_t in_features, int64_t group_size, int8_t* codes, int64_t stride, float* scale,
                 int32_t* sums) {
  // As integers, magnitudes compare as floats do, with infinity and NaN above every number.
  __m512i largest = _mm512_castps_si512(_mm512_set1_ps(smallest_amax));
  by_vectors(0, in_features, [&](int64_t k, __mmask16 lanes) INLINE_LAMBDA {
    largest = _mm512_max_epi32(largest, _mm512_castps_si512(_mm512_abs_ps(load16(x + k, lanes))));
  });
  const float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(largest))));
  const bool finite = amax - amax == 0;
  *scale = finite ? amax * (1.f / 127.f) : amax - amax;
  const __m512 inverse = _mm512_set1_ps(127.f / amax);
  // A token that is not finite gets codes of 0 and a scale of NaN.
  const __mmask16 used = finite ? 0xffff : 0;
  for (int64_t first = 0; first < in_features; first += group_size) {
    const int64_t end = first + group_size < in_features ? first + group_size : in_features;
    __m512i sum = _mm512_setzero_si512();
    by_vectors(first, end, [&](int64_t k, __mmask16 lanes) INLINE_LAMBDA {
      const __m512i code = _mm512_maskz_cvtps_epi32(used, _mm512_mul_ps(load16(x + k, lanes), inverse));
      sum = _mm512_add_epi32(sum, code);
      store_codes(codes + k, code);
    });
    *sums++ = _mm512_reduce_add_epi32(sum);
  }
  for (int64_t k = (in_features + 15) / 16 * 16; k < stride; k += 16) store_codes(codes + k, _mm512_setzero_si512());
}

void quantize(const void* x, DType dtype, int64_t in_features, int64_t group_size, int8_t* codes, int64_t stride,
              float* scale, int32_t* sums) {
  if (dtype == DType::f32) {
    quantize_as(static_cast<const float*>(x), in_features, group_size, codes, stride, scale, sums);
  } else if (dtype == DType::bf16) {
    quantize_as(static_cast<const BFloat16*>(x), in_features, group_size, codes, stride, scale, sums);
  } else {
    quantize_as(static_cast<const Float16*>(x), in_features, group_size, codes, stride, scale, sums);
  }
}

// ---- outputs --------------------------------------------------------------------------------------------------------

INLINE void store16(void* data, DType dtype, int64_t index, __mmask16 lanes, __m512 v) {
  if (dtype == DType::f32) {
    _mm512_mask_storeu_ps(static_cast<float*>(data) + index, lanes, v);
    return;
  }
  __m256i half;
  if (dtype == DType::f16) {
    half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
  }
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(data) + index, lanes, half);
}

// Elements [index, index + 16) of an array of any dtype.
INLINE __m512 load16(const void* data, DType dtype, int64_t index, __mmask16 lanes) {
  if (dtype == DType::f32) return load16(static_cast<const float*>(data) + index, lanes);
  if (dtype == DType::f16) return load16(static_cast<const Float16*>(data) + index, lanes);
  return load16(static_cast<const BFloat16*>(data) + index, lanes);
}

// Output features [column, column + 16) of the panel for one token.
INLINE void finish(__m512 total, const Tokens& tokens, int64_t row, int64_t column, const Output& output) {
  const int64_t index = row * output.row_stride + column;
  const __mmask16 lanes = first_lanes(output.columns - column);
  __m512 y = multiply_add(total, broadcast(tokens.scales[row]), _mm512_loadu_ps(output.bias + column));
  y = apply_epilogue(y, output);
  if (output.residual != nullptr) y = _mm512_add_ps(y, load16(output.residual, output.dtype, index, lanes));
  store16(output.data, output.dtype, index, lanes, y);
}

// ---- codes ----------------------------------------------------------------------------------------------------------

// A tile, 16 output features by 4 input features, to bytes. Each 64-bit lane holds 8 codes: gather its `Bits` bytes,
// then take byte j from bit Bits * j.
template <int Bits>
struct Unpacker {
  __m512i bytes, shifts, mask;

  INLINE Unpacker() {
    alignas(64) uint8_t from[64], at[64];
    for (int i = 0; i < 64; ++i) {
      from[i] = static_cast<uint8_t>(i % 8 < Bits ? i / 8 * Bits + i % 8 : 0);
      at[i] = static_cast<uint8_t>(i % 8 * Bits);
    }
    bytes = _mm512_load_si512(from);
    shifts = _mm512_load_si512(at);
    mask = _mm512_set1_epi8(static_cast<char>((1 << Bits) - 1));
  }

  INLINE __m512i operator()(const uint8_t* tile) const {
    if constexpr (Bits == 8) {
      return _mm512_loadu_si512(tile);
    } else {
      const __m512i lanes = _mm512_permutexvar_epi8(bytes, load(tile));
      return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, lanes), mask);
    }
  }

  static INLINE __m512i load(const uint8_t* tile) {
    if constexpr (Bits == 4) {
      return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile)));
    } else {
      return _mm512_maskz_loadu_epi8((uint64_t{1} << 8 * Bits) - 1, tile);
    }
  }
};

constexpr __mmask16 all_lanes = 0xffff;

INLINE __m512 load_scales(const Panel& panel, int64_t group, int64_t column) {
  return load16(panel.steps.scales, panel.steps.dtype, group * panel_width + column, all_lanes);
}

// The integers that come off the codes.
INLINE __m512i load_zeros(const Panel& panel, int64_t group, int64_t column) {
  if (panel.steps.kind != Zeros::codes) return _mm512_set1_epi32(panel.midpoint());
  const uint8_t* zeros = static_cast<const uint8_t*>(panel.steps.zeros) + group * panel_width + column;
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
}

INLINE __m512 load_shifts(const Panel& panel, int64_t group, int64_t column) {
  __m512 zeros = broadcast(0.5f);
  if (panel.steps.kind == Zeros::fractional) {
    zeros = load16(panel.steps.zeros, panel.steps.dtype, group * panel_width + column, all_lanes);
  }
  const __m512 rest = sub(broadcast(static_cast<float>(panel.midpoint())), zeros);
  return mul(load_scales(panel, group, column), rest);
}

INLINE __m512i load_quad(const int8_t* codes) {
  int32_t value;
  __builtin_memcpy(&value, codes, sizeof value);
  return _mm512_set1_epi32(value);
}

// sum + weights * a, four products per 32-bit lane. In assembly because GCC, given the intrinsic, keeps a second copy
// of every accumulator of a tile and moves between the two in each step.
INLINE __m512i add_products(__m512i sum, __m512i weights, __m512i a) {
  asm("vpdpbusd %[a], %[weights], %[sum]" : [sum] "+v"(sum) : [weights] "v"(weights), [a] "v"(a));
  return sum;
}

// ---- few tokens -----------------------------------------------------------------------------------------------------

template <int Bits, int Rows>
void stream(const Panel& panel, const Tokens& tokens, const Output& output) {
  constexpr int tiles = panel_width / tile_width;
  const Unpacker<Bits> unpack;
  __m512 total[Rows][tiles];
  for (int r = 0; r < Rows; ++r) {
    for (int t = 0; t < tiles; ++t) total[r][t] = _mm512_setzero_ps();
  }
  const uint8_t* tile = panel.codes;
  const int8_t* quads = tokens.codes;
  for (int64_t group = 0; group < panel.groups; ++group) {
    __m512i dot[Rows][tiles];
    for (int t = 0; t < tiles; ++t) {
      const __m512i zeros = load_zeros(panel, group, t * tile_width);
      for (int r = 0; r < Rows; ++r) {
        dot[r][t] = _mm512_mullo_epi32(zeros, _mm512_set1_epi32(-tokens.sums[r * panel.groups + group]));
      }
    }
    for (int64_t n = panel.quads_in(group); n > 0; --n) {
      __m512i weights[tiles];
      for (int t = 0; t < tiles; ++t, tile += 8 * Bits) weights[t] = unpack(tile);
      for (int r = 0; r < Rows; ++r) {
        const __m512i a = load_quad(quads + r * tokens.stride);
        for (int t = 0; t < tiles; ++t) dot[r][t] = add_products(dot[r][t], weights[t], a);
      }
      quads += quad;
    }
    for (int t = 0; t < tiles; ++t) {
      const __m512 scales = load_scales(panel, group, t * tile_width);
      for (int r = 0; r < Rows; ++r) total[r][t] = multiply_add(_mm512_cvtepi32_ps(dot[r][t]), scales, total[r][t]);
      if (!panel.is_shifted()) continue;
      const __m512 shifts = load_shifts(panel, group, t * tile_width);
      for (int r = 0; r < Rows; ++r) {
        const float sum = static_cast<float>(tokens.sums[r * panel.groups + group]);
        total[r][t] = multiply_add(broadcast(sum), shifts, total[r][t]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int t = 0; t < tiles; ++t) finish(total[r][t], tokens, r, t * tile_width, output);
  }
}

// ---- many tokens ----------------------------------------------------------------------------------------------------

#include "qmatmul/unpacked.inl"

// What a group adds after its products.
enum class After {
  nothing,
  zeros,  // zero points that could not be folded into the bytes
  shifts,
};

INLINE After after_products(const Panel& panel) {
  if (panel.is_shifted()) return After::shifts;
  return panel.bits == 8 && panel.steps.kind == Zeros::codes ? After::zeros : After::nothing;
}

template <int Bits>
void unpack_panel(const Panel& panel, const Unpacked& to) {
  const Unpacker<Bits> unpack;
  const After after = after_products(panel);
  for (int64_t group = 0; group < panel.groups; ++group) {
    const int64_t quads = panel.quads_in(group);
    for (int64_t t = 0; t < panel_width / tile_width; ++t) {
      const int64_t column = group * panel_width + t * tile_width;
      const __m512i zeros = load_zeros(panel, group, t * tile_width);
      _mm512_store_ps(to.scales + column, load_scales(panel, group, t * tile_width));
      if (after == After::zeros) _mm512_store_si512(to.zeros + column, zeros);
      if (after == After::shifts) _mm512_store_ps(to.shifts + column, load_shifts(panel, group, t * tile_width));
      // 128 - zero in every byte of a column's lane.
      const __m512i offset = after == After::zeros ? _mm512_setzero_si512()
                                                   : _mm512_mullo_epi32(_mm512_sub_epi32(_mm512_set1_epi32(128), zeros),
                                                                        _mm512_set1_epi32(0x01010101));
      const int64_t first = group * panel.group_quads * 4 + t;
      for (int64_t tile = first; tile < first + quads * 4; tile += 4) {
        const __m512i bytes = _mm512_add_epi8(unpack(panel.codes + tile * 8 * Bits), offset);
        _mm512_store_si512(to.bytes + tile * 64, bytes);
      }
    }
  }
}

constexpr int tile_rows = 6;
constexpr int tile_columns = 2;  // of 16 output features

template <int Rows, After after>
void multiply_tile(const Panel& panel, const Unpacked& weights, const Tokens& tokens, int64_t row, int64_t first_tile,
                   const Output& output) {
  __m512 total[Rows][tile_columns];
  for (int r = 0; r < Rows; ++r) {
    for (int t = 0; t < tile_columns; ++t) total[r][t] = _mm512_setzero_ps();
  }
  const uint8_t* bytes = weights.bytes + first_tile * 64;
  const int8_t* quads = tokens.codes + row * tokens.stride;
  const int32_t* sums = tokens.sums + row * panel.groups;
  for (int64_t group = 0; group < panel.groups; ++group) {
    const int64_t column = group * panel_width + first_tile * tile_width;
    __m512i dot[Rows][tile_columns];
    for (int r = 0; r < Rows; ++r) {
      const int32_t start = after == After::zeros ? 0 : -128 * sums[r * panel.groups + group];
      for (int t = 0; t < tile_columns; ++t) dot[r][t] = _mm512_set1_epi32(start);
    }
    for (int64_t n = panel.quads_in(group); n > 0; --n) {
      __m512i w[tile_columns];
      for (int t = 0; t < tile_columns; ++t) w[t] = _mm512_load_si512(bytes + t * 64);
      for (int r = 0; r < Rows; ++r) {
        const __m512i a = load_quad(quads + r * tokens.stride);
        for (int t = 0; t < tile_columns; ++t) dot[r][t] = add_products(dot[r][t], w[t], a);
      }
      bytes += quad * panel_width;
      quads += quad;
    }
    for (int t = 0; t < tile_columns; ++t) {
      const __m512 scales = _mm512_load_ps(weights.scales + column + t * tile_width);
      for (int r = 0; r < Rows; ++r) {
        if constexpr (after == After::zeros) {
          const __m512i sum = _mm512_set1_epi32(sums[r * panel.groups + group]);
          const __m512i zeros = _mm512_load_si512(weights.zeros + column + t * tile_width);
          dot[r][t] = _mm512_sub_epi32(dot[r][t], _mm512_mullo_epi32(zeros, sum));
        }
        total[r][t] = multiply_add(_mm512_cvtepi32_ps(dot[r][t]), scales, total[r][t]);
        if constexpr (after == After::shifts) {
          const __m512 sum = broadcast(static_cast<float>(sums[r * panel.groups + group]));
          const __m512 shifts = _mm512_load_ps(weights.shifts + column + t * tile_width);
          total[r][t] = multiply_add(sum, shifts, total[r][t]);
        }
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int t = 0; t < tile_columns; ++t) {
      finish(total[r][t], tokens, row + r, (first_tile + t) * tile_width, output);
    }
  }
}

using MultiplyTile = void (*)(const Panel&, const Unpacked&, const Tokens&, int64_t, int64_t, const Output&);
template <After after>
constexpr MultiplyTile multiply_tile_of[tile_rows + 1] = {nullptr,
                                                          multiply_tile<1, after>,
                                                          multiply_tile<2, after>,
                                                          multiply_tile<3, after>,
                                                          multiply_tile<4, after>,
                                                          multiply_tile<5, after>,
                                                          multiply_tile<6, after>};

template <int Bits>
void multiply_bits(const Panel& panel, const Tokens& tokens, const Output& output, void* scratch) {
  switch (tokens.rows) {
    case 1:
      return stream<Bits, 1>(panel, tokens, output);
    case 2:
      return stream<Bits, 2>(panel, tokens, output);
    case 3:
      return stream<Bits, 3>(panel, tokens, output);
    case 4:
      return stream<Bits, 4>(panel, tokens, output);
    default:
      break;
  }
  const Unpacked weights(panel, scratch);
  unpack_panel<Bits>(panel, weights);
  const After after = after_products(panel);
  const MultiplyTile* of_rows = after == After::zeros    ? multiply_tile_of<After::zeros>
                                : after == After::shifts ? multiply_tile_of<After::shifts>
                                                         : multiply_tile_of<After::nothing>;
  const int64_t used_tiles = (output.columns + tile_width - 1) / tile_width;
  for (int64_t row = 0; row < tokens.rows; row += tile_rows) {
    const int64_t rows = tokens.rows - row < tile_rows ? tokens.rows - row : tile_rows;
    for (int64_t tile = 0; tile < used_tiles; tile += tile_columns) {
      of_rows[rows](panel, weights, tokens, row, tile, output);
    }
  }
}

void multiply(const Panel& panel, const Tokens& tokens, const Output& output, void* scratch) {
  constexpr decltype(&multiply) of_bits[] = {nullptr,          multiply_bits<1>, multiply_bits<2>,
                                             multiply_bits<3>, multiply_bits<4>, multiply_bits<5>,
                                             multiply_bits<6>, multiply_bits<7>, multiply_bits<8>};
  of_bits[panel.bits](panel, tokens, output, scratch);
}

}  // namespace
}  // namespace avx512vnni

extern const Kernels avx512vnni_kernels;
const Kernels avx512vnni_kernels = {avx512vnni::quantize, avx512vnni::multiply, avx512vnni::scratch_bytes};

}  // namespace fastembed::qmatmul
