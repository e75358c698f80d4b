// What the AVX-512 levels share: vectors, element types, epilogues, outputs and codes. Included inside the anonymous
// namespace of a file *_<level>.cpp; needs AVX-512 F, BW, DQ, VL and VBMI.

using Vec = __m512;
using Index = __m512i;

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 12")
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

constexpr __mmask16 all_lanes = 0xffff;
INLINE __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? all_lanes : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// ---- element types --------------------------------------------------------------------------------------------------

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

// ---- outputs --------------------------------------------------------------------------------------------------------

INLINE void store16(float* p, __mmask16 lanes, __m512 v) { _mm512_mask_storeu_ps(p, lanes, v); }
INLINE void store16(Float16* p, __mmask16 lanes, __m512 v) {
  _mm256_mask_storeu_epi16(p, lanes, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE void store16(BFloat16* p, __mmask16 lanes, __m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
  _mm256_mask_storeu_epi16(p, lanes, _mm512_cvtepi32_epi16(high));
}

// Elements [index, index + 16) of an array of any dtype.
INLINE __m512 load16(const void* data, DType dtype, int64_t index, __mmask16 lanes) {
  if (dtype == DType::f32) return load16(static_cast<const float*>(data) + index, lanes);
  if (dtype == DType::f16) return load16(static_cast<const Float16*>(data) + index, lanes);
  return load16(static_cast<const BFloat16*>(data) + index, lanes);
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
  for (int64_t i = 0; i < sums.width; i += 16) {
    const int64_t column = sums.column + i;
    const __mmask16 lanes = first_lanes(output.columns - column);
    const __m512 bias = _mm512_load_ps(output.bias + column);
    const int64_t first = sums.row * output.row_stride + column;
    T* to = static_cast<T*>(output.data) + first;
    const T* residual = output.residual == nullptr ? nullptr : static_cast<const T*>(output.residual) + first;
    for (int64_t r = 0; r < sums.rows; ++r) {
      const __m512 total = _mm512_load_ps(sums.data + r * sums.width + i);
      __m512 y = multiply_add(total, broadcast(scales[r]), bias);
      y = apply_epilogue<epilogue>(y, output.gate);
      if (residual != nullptr) y = _mm512_add_ps(y, load16(residual + r * output.row_stride, lanes));
      store16(to + r * output.row_stride, lanes, y);
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

// A tile, 16 output features by 4 input features, to bytes: each 64-bit lane gets the `Bits` bytes of its word, then
// byte j is taken from bit Bits * j. Nibbles have a shorter way. Masked loads are slow, so whole registers are read, of
// which one end is the tile: forwards in the first half of a panel, backwards in the second, always within the tile's
// quad.
template <int Bits>
struct Unpacker {
  static constexpr int tile_bytes = 8 * Bits;
  static constexpr int loaded_bytes = Bits == 3 ? 32 : 64;
  __m512i bytes, shifts, mask;
  int64_t start;  // of what is read, from the tile on

  // For tiles from output feature `column` of the panel on, to the end of its half.
  INLINE explicit Unpacker(int64_t column) {
    const int before = column < panel_width / 2 ? 0 : loaded_bytes - tile_bytes;
    start = -before;
    alignas(64) uint8_t from[64], at[64];
    for (int i = 0; i < 64; ++i) {
      from[i] = static_cast<uint8_t>(before + (i % 8 < Bits ? i / 8 * Bits + i % 8 : 0));
      at[i] = static_cast<uint8_t>(i % 8 * Bits);
    }
    bytes = _mm512_load_si512(from);
    shifts = _mm512_load_si512(at);
    mask = _mm512_set1_epi8(static_cast<char>((1 << Bits) - 1));
  }

  INLINE __m512i lanes(const uint8_t* tile) const {
    if constexpr (Bits == 1) return _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(tile)));
    if constexpr (Bits == 2) return _mm512_cvtepu16_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tile)));
    if constexpr (Bits == 3) {
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + start));
      return _mm512_permutexvar_epi8(bytes, _mm512_castsi256_si512(words));
    }
    return _mm512_permutexvar_epi8(bytes, _mm512_loadu_si512(tile + start));
  }

  INLINE __m512i operator()(const uint8_t* tile) const {
    if constexpr (Bits == 8) {
      return _mm512_loadu_si512(tile);
    } else if constexpr (Bits == 4) {
      const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile)));
      constexpr int either_and_mask = 0xa8;
      return _mm512_ternarylogic_epi32(pairs, _mm512_slli_epi16(pairs, 4), mask, either_and_mask);
    } else {
      return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, lanes(tile)), mask);
    }
  }
};

INLINE __m512 load_scales(const Panel& panel, int64_t group, int64_t column) {
  return load16(panel.steps.scales, panel.steps.dtype, group * panel_width + column, all_lanes);
}

// The integers that come off the codes.
INLINE __m512i load_zeros(const Panel& panel, int64_t group, int64_t column) {
  if (panel.steps.kind != Zeros::codes) return _mm512_set1_epi32(panel.midpoint());
  const uint8_t* zeros = static_cast<const uint8_t*>(panel.steps.zeros) + group * panel_width + column;
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
}

// The whole zero points.
INLINE __m512 load_zero_points(const Panel& panel, int64_t group, int64_t column) {
  if (panel.steps.kind == Zeros::fractional) {
    return load16(panel.steps.zeros, panel.steps.dtype, group * panel_width + column, all_lanes);
  }
  return panel.is_shifted() ? broadcast(0.5f) : widen(load_zeros(panel, group, column));
}

INLINE __m512 load_shifts(const Panel& panel, int64_t group, int64_t column) {
  const __m512 rest = sub(broadcast(static_cast<float>(panel.midpoint())), load_zero_points(panel, group, column));
  return mul(load_scales(panel, group, column), rest);
}

// ---- blocks ---------------------------------------------------------------------------------------------------------

constexpr int tile_rows = 6;
constexpr int tile_vectors = 2;  // of 16 output features
constexpr int64_t block_columns = tile_vectors * tile_width;

#include "qmatmul/blocked.inl"

// The float sums of a tile: from memory, [Rows, block_columns], unless they begin with this block.
template <int Rows>
INLINE void begin_tile(const Block& block, const float* totals, __m512 (&total)[Rows][tile_vectors]) {
  if (block.first) {
    UNROLL for (int r = 0; r < Rows; ++r) {
      UNROLL for (int t = 0; t < tile_vectors; ++t) total[r][t] = _mm512_setzero_ps();
    }
    return;
  }
  UNROLL for (int r = 0; r < Rows; ++r) {
    UNROLL for (int t = 0; t < tile_vectors; ++t) {
      total[r][t] = _mm512_load_ps(totals + r * block_columns + t * tile_width);
    }
  }
}

// Back to memory, or to where they are wanted, for the tokens from `row` on.
template <int Rows>
INLINE void end_tile(const Block& block, int64_t row, const float* scales, const __m512 (&total)[Rows][tile_vectors],
                     float* totals) {
  if (block.plain == nullptr) {
    UNROLL for (int r = 0; r < Rows; ++r) {
      UNROLL for (int t = 0; t < tile_vectors; ++t) {
        _mm512_store_ps(totals + r * block_columns + t * tile_width, total[r][t]);
      }
    }
    return;
  }
  const Output& output = *block.plain;
  UNROLL for (int t = 0; t < tile_vectors; ++t) {
    const int64_t column = block.column + t * tile_width;
    const __mmask16 lanes = first_lanes(output.columns - column);
    const __m512 bias = _mm512_load_ps(output.bias + column);
    float* to = static_cast<float*>(output.data) + row * output.row_stride + column;
    UNROLL for (int r = 0; r < Rows; ++r) {
      store16(to + r * output.row_stride, lanes, multiply_add(total[r][t], broadcast(scales[r]), bias));
    }
  }
}
