// AVX-512 with bfloat16 dot products: exact products of pairs, summed in float32, 32 pairs per instruction. Codes less
// their origin are integers of at most 8 bits and a sign, so they are bfloat16 numbers; their scales follow in float32
// after each group, as in the int8 kernels, and likewise what a fractional zero point adds.
#include <immintrin.h>

#include "qmatmul/kernels.hpp"

// GCC's own _mm512_undefined_* trip this warning (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace fastembed::qmatmul {
namespace avx512bf16 {
namespace {

#include "qmatmul/avx512.inl"

void copy(const uint16_t* x, int64_t in_features, int64_t group_size, uint16_t* values, int64_t stride, float* sums) {
  for (int64_t k = 0; k < stride; k += 16) {
    const __m256i v = _mm256_maskz_loadu_epi16(first_lanes(in_features - k), x + k);
    _mm256_store_si256(reinterpret_cast<__m256i*>(values + k), v);
  }
  for (int64_t first = 0; first < in_features; first += group_size) {
    const int64_t end = first + group_size < in_features ? first + group_size : in_features;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = first; k < end; k += 16) {
      sum = _mm512_add_ps(sum, load16(reinterpret_cast<const BFloat16*>(x) + k, first_lanes(end - k)));
    }
    *sums++ = _mm512_reduce_add_ps(sum);
  }
}

// Codes of one input feature of a tile, less their origin, in float32.
template <int k>
INLINE __m512i centred(__m512i codes, __m512 origins) {
  const __m512i code = k == 3 ? _mm512_srli_epi32(codes, 24)
                              : _mm512_and_si512(_mm512_srli_epi32(codes, 8 * k), _mm512_set1_epi32(0xff));
  return _mm512_castps_si512(sub(widen(code), origins));
}

// Two of them as pairs of bfloat16.
INLINE __m512i pairs(__m512i even, __m512i odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
}

// To [2 * quads, block_columns] pairs.
template <int Bits>
void unpack_block(const Panel& panel, const Block& block) {
  const Unpacker<Bits> unpack(block.column);
  __m512i* to = static_cast<__m512i*>(block.weights);
  const uint8_t* tile = panel.codes + (block.first_quad * 4 + block.column / tile_width) * 8 * Bits;
  for (int64_t i = 0; i * panel.group_quads < block.quads; ++i) {
    const int64_t group = block.first_group + i;
    __m512 origins[tile_vectors];
    for (int t = 0; t < tile_vectors; ++t) {
      const int64_t column = block.column + t * tile_width, at = i * block_columns + t * tile_width;
      origins[t] = widen(load_zeros(panel, group, column));
      _mm512_store_ps(block.scales + at, load_scales(panel, group, column));
      if (panel.is_shifted()) _mm512_store_ps(block.shifts + at, load_shifts(panel, group, column));
    }
    for (int64_t n = panel.quads_in(group); n > 0; --n, tile += 4 * 8 * Bits, to += 2 * tile_vectors) {
      for (int t = 0; t < tile_vectors; ++t) {
        const __m512i codes = unpack(tile + t * 8 * Bits);
        _mm512_store_si512(to + t, pairs(centred<0>(codes, origins[t]), centred<1>(codes, origins[t])));
        _mm512_store_si512(to + tile_vectors + t, pairs(centred<2>(codes, origins[t]), centred<3>(codes, origins[t])));
      }
    }
  }
}

// sum + a pair of products per lane; in assembly for the reason given in qmatmul_avx512vnni.cpp.
INLINE __m512 add_products(__m512 sum, __m512i weights, __m512i a) {
  asm("vdpbf16ps %[a], %[weights], %[sum]" : [sum] "+v"(sum) : [weights] "v"(weights), [a] "v"(a));
  return sum;
}

template <int Rows>
void multiply_tile(const Panel& panel, const Block& block, const BFloat16Tokens& tokens, int64_t row, float* totals) {
  __m512 total[Rows][tile_vectors];
  begin_tile(block, totals, total);
  const __m512i* weights = static_cast<const __m512i*>(block.weights);
  const uint16_t* x = tokens.values + row * tokens.stride + block.first_quad * quad;
  const float* sums = tokens.sums + row * panel.groups + block.first_group;
  for (int64_t group = 0; group * panel.group_quads < block.quads; ++group) {
    block.ahead->fetch();
    const int64_t at = group * block_columns;
    __m512 dot[Rows][tile_vectors];
    UNROLL for (int r = 0; r < Rows; ++r) {
      UNROLL for (int t = 0; t < tile_vectors; ++t) dot[r][t] = _mm512_setzero_ps();
    }
    for (int64_t n = 2 * panel.quads_in(block.first_group + group); n > 0; --n, weights += tile_vectors, x += 2) {
      __m512i w[tile_vectors];
      UNROLL for (int t = 0; t < tile_vectors; ++t) w[t] = _mm512_load_si512(weights + t);
      UNROLL for (int r = 0; r < Rows; ++r) {
        int32_t pair;
        __builtin_memcpy(&pair, x + r * tokens.stride, sizeof pair);
        const __m512i a = _mm512_set1_epi32(pair);
        UNROLL for (int t = 0; t < tile_vectors; ++t) dot[r][t] = add_products(dot[r][t], w[t], a);
      }
    }
    UNROLL for (int t = 0; t < tile_vectors; ++t) {
      const __m512 scales = _mm512_load_ps(block.scales + at + t * tile_width);
      UNROLL for (int r = 0; r < Rows; ++r) total[r][t] = multiply_add(dot[r][t], scales, total[r][t]);
      if (!panel.is_shifted()) continue;
      const __m512 shifts = _mm512_load_ps(block.shifts + at + t * tile_width);
      UNROLL for (int r = 0; r < Rows; ++r) {
        total[r][t] = multiply_add(broadcast(sums[r * panel.groups + group]), shifts, total[r][t]);
      }
    }
  }
  end_tile(block, row, scales_of(tokens, row), total, totals);
}

constexpr MultiplyTile<BFloat16Tokens> multiply_tile_of[tile_rows + 1] = {
    nullptr,          multiply_tile<1>, multiply_tile<2>, multiply_tile<3>,
    multiply_tile<4>, multiply_tile<5>, multiply_tile<6>};

void multiply(const Panel& panel, const BFloat16Tokens& tokens, const Output& output, void* scratch) {
  constexpr UnpackBlock of_bits[] = {nullptr,         unpack_block<1>, unpack_block<2>,
                                     unpack_block<3>, unpack_block<4>, unpack_block<5>,
                                     unpack_block<6>, unpack_block<7>, unpack_block<8>};
  multiply_blocks(panel, tokens, output, scratch, cut_by_groups(panel, 2), of_bits[panel.bits], multiply_tile_of);
}

int64_t scratch_bytes(const Panel& panel, int64_t rows) { return scratch_bytes(panel, rows, cut_by_groups(panel, 2)); }

}  // namespace
}  // namespace avx512bf16

extern const BFloat16Kernels avx512bf16_kernels;
const BFloat16Kernels avx512bf16_kernels = {avx512bf16::copy, avx512bf16::multiply, avx512bf16::scratch_bytes};

}  // namespace fastembed::qmatmul
