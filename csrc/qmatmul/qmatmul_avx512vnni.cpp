// AVX-512 with VNNI and VBMI: unsigned weight bytes times signed activations, 64 products per instruction.
//
// Many tokens: blocks of the panel are unpacked to bytes that stay in the first-level cache, and multiplied by tiles of
// 6 tokens x 32 output features whose integer and float accumulators both stay in registers. The unpacked byte is
// code - zero + 128, so that the zero points cost nothing: 128 times the activations' sum is the same for every output
// feature and is where the accumulators start. 8-bit codes with zero points of their own do not fit in a byte that way;
// they stay as they are. Every instruction that would multiply zero and sum has the ports of the products, so the 16
// multiples of each sum that four bits can name are there beforehand, and permutations look the zeros up in them.
// Few tokens: codes are unpacked in registers, as they stream by; for one token, those of 2 and 4 bits less than that.
// Both ways compute the same integers and then the same float operations: a token's result is the same in any batch.
#include <immintrin.h>

#include "qmatmul/kernels.hpp"

// GCC's own _mm512_undefined_* trip this warning (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace fastembed::qmatmul {
namespace avx512vnni {
namespace {

#include "qmatmul/avx512.inl"

// ---- activations ----------------------------------------------------------------------------------------------------

template <class T>
INLINE __m512i load_magnitudes(const T* x, __mmask16 lanes) {
  return _mm512_castps_si512(_mm512_abs_ps(load16(x, lanes)));
}

// The largest magnitude, at least smallest_amax. As integers, magnitudes compare as floats do, with infinity and NaN
// above every number.
template <class T>
float largest_magnitude(const T* x, int64_t count) {
  __m512i largest[4];
  for (__m512i& v : largest) v = _mm512_castps_si512(broadcast(smallest_amax));
  int64_t k = 0;
  for (; k + 64 <= count; k += 64) {
    UNROLL for (int i = 0; i < 4; ++i) {
      largest[i] = _mm512_max_epi32(largest[i], load_magnitudes(x + k + 16 * i, all_lanes));
    }
  }
  for (; k < count; k += 16) largest[0] = _mm512_max_epi32(largest[0], load_magnitudes(x + k, first_lanes(count - k)));
  largest[0] = _mm512_max_epi32(_mm512_max_epi32(largest[0], largest[1]), _mm512_max_epi32(largest[2], largest[3]));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(largest[0]))));
}

template <class T>
void quantize_as(const T* x, int64_t in_features, int8_t* codes, int64_t stride, float* scale) {
  const float amax = largest_magnitude(x, in_features);
  const bool finite = amax - amax == 0;
  *scale = finite ? amax * (1.f / 127.f) : amax - amax;
  const __m512 inverse = broadcast(127.f / amax);
  // A token that is not finite gets codes of 0 and a scale of NaN.
  const __mmask16 used = finite ? all_lanes : 0;
  // Packing works within 128-bit lanes; this puts their fours of codes back in order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const auto convert = [&](int64_t k, __mmask16 lanes) INLINE_LAMBDA {
    return _mm512_maskz_cvtps_epi32(used, _mm512_mul_ps(load16(x + k, lanes), inverse));
  };
  const auto store = [&](int64_t k, __m512i a, __m512i b, __m512i c, __m512i d) INLINE_LAMBDA {
    const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    _mm512_store_si512(codes + k, _mm512_permutexvar_epi32(order, bytes));
  };
  int64_t k = 0;
  for (; k + 64 <= in_features; k += 64) {
    store(k, convert(k, all_lanes), convert(k + 16, all_lanes), convert(k + 32, all_lanes), convert(k + 48, all_lanes));
  }
  for (; k < stride; k += 64) {
    __m512i parts[4];
    for (int i = 0; i < 4; ++i) parts[i] = convert(k + 16 * i, first_lanes(in_features - k - 16 * i));
    store(k, parts[0], parts[1], parts[2], parts[3]);
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

void sum_groups(const int8_t* codes, int64_t in_features, int64_t group_size, int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t first = 0; first < in_features; first += group_size) {
    const int64_t end = first + group_size < in_features ? first + group_size : in_features;
    __m512i sum = _mm512_setzero_si512();
    int64_t k = first;
    for (; k + 64 <= end; k += 64) sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(codes + k));
    if (k < end) {
      const __mmask64 rest = (uint64_t{1} << (end - k)) - 1;
      sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8(rest, codes + k));
    }
    *sums++ = _mm512_reduce_add_epi32(sum);
  }
}

void multiply_sums(const int32_t* sums, int64_t groups, int32_t* multiples) {
  const __m512i counting = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < groups; ++i) {
    _mm512_store_si512(multiples + i * sum_multiples, _mm512_mullo_epi32(counting, _mm512_set1_epi32(-sums[i])));
  }
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

// As many output features at once as the registers have room for, with an integer and a float sum for each; from 7
// tokens on the float sums wait in memory, which costs less per group than going through the panel once more.
constexpr int tiles_at_once(int rows) { return rows <= 2 ? 4 : 2; }
constexpr int streamed_rows = 12;
// Two passes still cost less than unpacking to memory; three do not.
constexpr int most_streamed_rows = 16;

template <int Bits, int Rows>
void stream(const Panel& panel, const Tokens& tokens, int64_t first_row, const Output& output) {
  constexpr int tiles = tiles_at_once(Rows);
  const Unpacker<Bits> unpack[] = {Unpacker<Bits>(0), Unpacker<Bits>(panel_width / 2)};  // by halves
  const int8_t* codes = tokens.codes + first_row * tokens.stride;
  const int32_t* sums = tokens.sums + first_row * panel.groups;
  for (int64_t column = 0; column < output.columns; column += tiles * tile_width) {
    __m512 total[Rows][tiles];
    UNROLL for (int r = 0; r < Rows; ++r) { UNROLL for (int t = 0; t < tiles; ++t) total[r][t] = _mm512_setzero_ps(); }
    const uint8_t* tile = panel.codes + column / tile_width * 8 * Bits;
    const int8_t* quads = codes;
    for (int64_t group = 0; group < panel.groups; ++group) {
      __m512i dot[Rows][tiles];
      UNROLL for (int t = 0; t < tiles; ++t) {
        const __m512i zeros = load_zeros(panel, group, column + t * tile_width);
        UNROLL for (int r = 0; r < Rows; ++r) {
          dot[r][t] = _mm512_mullo_epi32(zeros, _mm512_set1_epi32(-sums[r * panel.groups + group]));
        }
      }
      for (int64_t n = panel.quads_in(group); n > 0; --n) {
        __m512i weights[tiles];
        UNROLL for (int t = 0; t < tiles; ++t) {
          weights[t] = unpack[(column + t * tile_width) / (panel_width / 2)](tile + t * 8 * Bits);
        }
        UNROLL for (int r = 0; r < Rows; ++r) {
          const __m512i a = load_quad(quads + r * tokens.stride);
          UNROLL for (int t = 0; t < tiles; ++t) dot[r][t] = add_products(dot[r][t], weights[t], a);
        }
        tile += panel_width / tile_width * 8 * Bits;
        quads += quad;
      }
      UNROLL for (int t = 0; t < tiles; ++t) {
        const __m512 scales = load_scales(panel, group, column + t * tile_width);
        UNROLL for (int r = 0; r < Rows; ++r) {
          total[r][t] = multiply_add(_mm512_cvtepi32_ps(dot[r][t]), scales, total[r][t]);
        }
        if (!panel.is_shifted()) continue;
        const __m512 shifts = load_shifts(panel, group, column + t * tile_width);
        UNROLL for (int r = 0; r < Rows; ++r) {
          const float sum = static_cast<float>(sums[r * panel.groups + group]);
          total[r][t] = multiply_add(broadcast(sum), shifts, total[r][t]);
        }
      }
    }
    alignas(64) float totals[Rows * tiles * tile_width];
    UNROLL for (int r = 0; r < Rows; ++r) {
      UNROLL for (int t = 0; t < tiles; ++t) _mm512_store_ps(totals + (r * tiles + t) * tile_width, total[r][t]);
    }
    finish({totals, Rows, tiles * tile_width, first_row, column}, tokens.scales + first_row, output);
  }
}

using Stream = void (*)(const Panel&, const Tokens&, int64_t, const Output&);
template <int Bits>
constexpr Stream stream_of[streamed_rows + 1] = {nullptr,         stream<Bits, 1>, stream<Bits, 2>,  stream<Bits, 3>,
                                                 stream<Bits, 4>, stream<Bits, 5>, stream<Bits, 6>,  stream<Bits, 7>,
                                                 stream<Bits, 8>, stream<Bits, 9>, stream<Bits, 10>, stream<Bits, 11>,
                                                 stream<Bits, 12>};

// ---- one token ------------------------------------------------------------------------------------------------------

// Codes of 2 and 4 bits, a byte of which belongs to one output feature. The products' operands, four bytes of an output
// feature per lane, come out of as many quads as a byte has codes; then one mask per place in the byte, and no shift,
// makes codes of them: every place has sums of its own, 2^(Bits * place) times what they should be. That takes half the
// instructions of spreading the codes first.
template <int Bits>
struct Planes {
  static constexpr int count = 8 / Bits;
  static constexpr int64_t quad_bytes = 32 * Bits;
  static constexpr int64_t features = count * quad;
  __m512i mask[count];

  INLINE Planes() {
    UNROLL for (int i = 0; i < count; ++i) mask[i] = _mm512_set1_epi8(static_cast<char>(((1 << Bits) - 1) << Bits * i));
  }

  // `count` quads of the panel, the bytes of an output feature side by side.
  static INLINE void gather(const uint8_t* at, __m512i (&bytes)[4]) {
    __m512i rows[4];
    UNROLL for (int i = 0; i < 4; ++i) rows[i] = _mm512_loadu_si512(at + 64 * i);
    if constexpr (Bits == 2) {
      const __m512i low = _mm512_unpacklo_epi8(rows[0], rows[1]), low_rest = _mm512_unpacklo_epi8(rows[2], rows[3]);
      const __m512i high = _mm512_unpackhi_epi8(rows[0], rows[1]), high_rest = _mm512_unpackhi_epi8(rows[2], rows[3]);
      bytes[0] = _mm512_unpacklo_epi16(low, low_rest);
      bytes[1] = _mm512_unpackhi_epi16(low, low_rest);
      bytes[2] = _mm512_unpacklo_epi16(high, high_rest);
      bytes[3] = _mm512_unpackhi_epi16(high, high_rest);
    } else {
      bytes[0] = _mm512_unpacklo_epi16(rows[0], rows[2]);
      bytes[1] = _mm512_unpackhi_epi16(rows[0], rows[2]);
      bytes[2] = _mm512_unpacklo_epi16(rows[1], rows[3]);
      bytes[3] = _mm512_unpackhi_epi16(rows[1], rows[3]);
    }
  }

  // From the order of `gather` to that of the output features.
  static INLINE void order(const __m512i (&sums)[4], __m512i (&tiles)[4]) {
    if constexpr (Bits == 2) {
      const __m512i a = _mm512_shuffle_i32x4(sums[0], sums[1], 0x44), b = _mm512_shuffle_i32x4(sums[2], sums[3], 0x44);
      const __m512i c = _mm512_shuffle_i32x4(sums[0], sums[1], 0xee), d = _mm512_shuffle_i32x4(sums[2], sums[3], 0xee);
      tiles[0] = _mm512_shuffle_i32x4(a, b, 0x88);
      tiles[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
      tiles[2] = _mm512_shuffle_i32x4(c, d, 0x88);
      tiles[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
    } else {
      const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                    second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
      UNROLL for (int half = 0; half < 2; ++half) {
        tiles[2 * half] = _mm512_permutex2var_epi64(sums[2 * half], first, sums[2 * half + 1]);
        tiles[2 * half + 1] = _mm512_permutex2var_epi64(sums[2 * half], second, sums[2 * half + 1]);
      }
    }
  }

  // The token's codes likewise: those that meet one mask side by side, four at a time.
  static void arrange(const int8_t* codes, int64_t quads, int8_t* arranged) {
    alignas(64) uint8_t from[64];
    for (int i = 0; i < 64; ++i) {
      const int place = i % features / 4, byte = i % 4;
      from[i] = static_cast<uint8_t>(i % 16 / features * features + count * byte + place);
    }
    for (int64_t k = 0; k < quads * quad; k += 64) {
      const __m512i ordered = _mm512_shuffle_epi8(_mm512_load_si512(codes + k), _mm512_load_si512(from));
      _mm512_store_si512(arranged + k, ordered);
    }
  }
};

template <int Bits>
void multiply_one(const Panel& panel, const Tokens& tokens, const Output& output, void* scratch) {
  constexpr int planes = Planes<Bits>::count;
  const Planes<Bits> plane;
  int8_t* arranged = static_cast<int8_t*>(scratch);
  plane.arrange(tokens.codes, panel.quads, arranged);
  const uint8_t* at = panel.codes;
  __m512 total[4];
  UNROLL for (__m512& sum : total) sum = _mm512_setzero_ps();
  for (int64_t group = 0; group < panel.groups; ++group) {
    __m512i sums[planes][4];
    UNROLL for (int i = 0; i < planes; ++i) { UNROLL for (int v = 0; v < 4; ++v) sums[i][v] = _mm512_setzero_si512(); }
    const auto add = [&](const uint8_t* quads) INLINE_LAMBDA {
      __m512i bytes[4];
      plane.gather(quads, bytes);
      UNROLL for (int i = 0; i < planes; ++i) {
        const __m512i a = load_quad(arranged + quad * i);
        UNROLL for (int v = 0; v < 4; ++v) {
          sums[i][v] = add_products(sums[i][v], _mm512_and_si512(bytes[v], plane.mask[i]), a);
        }
      }
      arranged += Planes<Bits>::features;
    };
    int64_t left = panel.quads_in(group);
    for (; left >= planes; left -= planes, at += planes * plane.quad_bytes) add(at);
    if (left > 0) {
      uint8_t last[planes * Planes<Bits>::quad_bytes] = {};
      __builtin_memcpy(last, at, static_cast<size_t>(left * plane.quad_bytes));
      add(last);
    }
    UNROLL for (int i = planes - 1; i > 0; --i) {
      UNROLL for (int v = 0; v < 4; ++v) {
        sums[i - 1][v] = _mm512_add_epi32(sums[i - 1][v], _mm512_srai_epi32(sums[i][v], Bits));
      }
    }
    __m512i dot[4];
    plane.order(sums[0], dot);
    UNROLL for (int t = 0; t < 4; ++t) {
      const int64_t column = t * tile_width;
      const __m512i zeros =
          _mm512_mullo_epi32(load_zeros(panel, group, column), _mm512_set1_epi32(-tokens.sums[group]));
      const __m512 scales = load_scales(panel, group, column);
      total[t] = multiply_add(_mm512_cvtepi32_ps(_mm512_add_epi32(dot[t], zeros)), scales, total[t]);
      if (!panel.is_shifted()) continue;
      const __m512 sum = broadcast(static_cast<float>(tokens.sums[group]));
      total[t] = multiply_add(sum, load_shifts(panel, group, column), total[t]);
    }
  }
  alignas(64) float totals[panel_width];
  UNROLL for (int t = 0; t < 4; ++t) _mm512_store_ps(totals + t * tile_width, total[t]);
  finish({totals, 1, panel_width, 0, 0}, tokens.scales, output);
}

// ---- many tokens ----------------------------------------------------------------------------------------------------

// Where the zero points went that are not in the unpacked bytes.
enum class Rest {
  nothing,
  zeros,   // 8-bit codes with zero points of their own: off the sums
  shifts,  // into the end of a group
};

bool has_zeros_apart(int bits, Zeros kind) { return bits == 8 && kind == Zeros::codes; }

INLINE Rest rest_of(const Panel& panel) {
  if (panel.is_shifted()) return Rest::shifts;
  return has_zeros_apart(panel.bits, panel.steps.kind) ? Rest::zeros : Rest::nothing;
}

// The parts of a tile's product that both ways to go about it share.
template <int Rows>
INLINE void begin_group(const int32_t* sums, int64_t groups, __m512i (&dot)[Rows][tile_vectors]) {
  UNROLL for (int r = 0; r < Rows; ++r) {
    const int32_t sum = sums[r * groups];
    UNROLL for (int t = 0; t < tile_vectors; ++t) dot[r][t] = _mm512_set1_epi32(-128 * sum);
  }
}

template <int Rows>
INLINE void multiply_quad(const __m512i (&w)[tile_vectors], const int8_t* quads, int64_t stride,
                          __m512i (&dot)[Rows][tile_vectors]) {
  UNROLL for (int r = 0; r < Rows; ++r) {
    const __m512i a = load_quad(quads + r * stride);
    UNROLL for (int t = 0; t < tile_vectors; ++t) dot[r][t] = add_products(dot[r][t], w[t], a);
  }
}

template <int Rows>
INLINE void end_group(const Block& block, int64_t group, const __m512i (&dot)[Rows][tile_vectors],
                      __m512 (&total)[Rows][tile_vectors]) {
  UNROLL for (int t = 0; t < tile_vectors; ++t) {
    const __m512 scales = _mm512_load_ps(block.scales + group * block_columns + t * tile_width);
    UNROLL for (int r = 0; r < Rows; ++r) {
      total[r][t] = multiply_add(_mm512_cvtepi32_ps(dot[r][t]), scales, total[r][t]);
    }
  }
}

template <int Rows>
INLINE void add_shifts(const Block& block, int64_t group, const int32_t* sums, int64_t groups,
                       __m512 (&total)[Rows][tile_vectors]) {
  UNROLL for (int t = 0; t < tile_vectors; ++t) {
    const __m512 shifts = _mm512_load_ps(block.shifts + group * block_columns + t * tile_width);
    UNROLL for (int r = 0; r < Rows; ++r) {
      total[r][t] = multiply_add(broadcast(static_cast<float>(sums[r * groups])), shifts, total[r][t]);
    }
  }
}

// 128 - zero in every byte of a column's lane.
INLINE __m512i byte_offsets(__m512i zeros) {
  return _mm512_mullo_epi32(_mm512_sub_epi32(_mm512_set1_epi32(128), zeros), _mm512_set1_epi32(0x01010101));
}

template <int Bits>
void unpack_block(const Panel& panel, const Block& block) {
  const Unpacker<Bits> unpack(block.column);
  const Rest rest = rest_of(panel);
  uint8_t* bytes = static_cast<uint8_t*>(block.weights);
  const uint8_t* tile = panel.codes + (block.first_quad * 4 + block.column / tile_width) * 8 * Bits;
  for (int64_t i = 0; i * panel.group_quads < block.quads; ++i) {
    const int64_t group = block.first_group + i;
    __m512i offsets[tile_vectors];
    for (int t = 0; t < tile_vectors; ++t) {
      const int64_t column = block.column + t * tile_width, at = i * block_columns + t * tile_width;
      const __m512i zeros = load_zeros(panel, group, column);
      _mm512_store_ps(block.scales + at, load_scales(panel, group, column));
      if (rest == Rest::zeros) {
        _mm512_store_si512(block.zeros + at, zeros);
        _mm512_store_si512(block.upper_zeros + at, _mm512_srli_epi32(zeros, 4));
      }
      if (rest == Rest::shifts) _mm512_store_ps(block.shifts + at, load_shifts(panel, group, column));
      offsets[t] = rest == Rest::zeros ? _mm512_setzero_si512() : byte_offsets(zeros);
    }
    if constexpr (Bits == 8) continue;  // bytes already, which are used where they are
    for (int64_t n = panel.quads_in(group); n > 0; --n) {
      for (int t = 0; t < tile_vectors; ++t) {
        _mm512_store_si512(bytes + t * 64, _mm512_add_epi8(unpack(tile + t * 8 * Bits), offsets[t]));
      }
      tile += 4 * 8 * Bits;
      bytes += quad * block_columns;
    }
  }
}

// unpack_block and the tile that comes first, together: unpacking is done by ports that leave the products alone.
template <int Bits, int Rows>
void unpack_and_multiply(const Panel& panel, const Block& block, const Tokens& tokens, int64_t row, float* totals) {
  const Unpacker<Bits> unpack(block.column);
  const bool shifted = panel.is_shifted();
  uint8_t* bytes = static_cast<uint8_t*>(block.weights);
  const uint8_t* tile = panel.codes + (block.first_quad * 4 + block.column / tile_width) * 8 * Bits;
  const int8_t* quads = tokens.codes + row * tokens.stride + block.first_quad * quad;
  const int32_t* sums = tokens.sums + row * panel.groups + block.first_group;
  __m512 total[Rows][tile_vectors];
  begin_tile(block, totals, total);
  for (int64_t i = 0; i * panel.group_quads < block.quads; ++i) {
    block.ahead->fetch();
    const int64_t group = block.first_group + i;
    __m512i offsets[tile_vectors];
    UNROLL for (int t = 0; t < tile_vectors; ++t) {
      const int64_t column = block.column + t * tile_width, at = i * block_columns + t * tile_width;
      _mm512_store_ps(block.scales + at, load_scales(panel, group, column));
      if (shifted) _mm512_store_ps(block.shifts + at, load_shifts(panel, group, column));
      offsets[t] = byte_offsets(load_zeros(panel, group, column));
    }
    __m512i dot[Rows][tile_vectors];
    begin_group(sums + i, panel.groups, dot);
    for (int64_t n = panel.quads_in(group); n > 0; --n) {
      __m512i w[tile_vectors];
      UNROLL for (int t = 0; t < tile_vectors; ++t) {
        w[t] = _mm512_add_epi8(unpack(tile + t * 8 * Bits), offsets[t]);
        _mm512_store_si512(bytes + t * 64, w[t]);
      }
      multiply_quad(w, quads, tokens.stride, dot);
      tile += 4 * 8 * Bits;
      bytes += quad * block_columns;
      quads += quad;
    }
    end_group(block, i, dot, total);
    if (shifted) add_shifts(block, i, sums + i, panel.groups, total);
  }
  end_tile(block, row, tokens.scales + row, total, totals);
}

// For the heights that the first tile of enough tokens may have.
template <int Bits>
constexpr MultiplyTile<Tokens> unpack_and_multiply_of[tile_rows + 1] = {
    nullptr, nullptr, nullptr, nullptr, nullptr, unpack_and_multiply<Bits, 5>, unpack_and_multiply<Bits, 6>};

template <int Rows, Rest rest>
void multiply_tile(const Panel& panel, const Block& block, const Tokens& tokens, int64_t row, float* totals) {
  __m512 total[Rows][tile_vectors];
  begin_tile(block, totals, total);
  const bool unpacked = panel.bits != 8;
  const int64_t first_tile = block.first_quad * (panel_width / tile_width) + block.column / tile_width;
  const uint8_t* bytes = unpacked ? static_cast<const uint8_t*>(block.weights) : panel.codes + first_tile * 64;
  const int64_t step = quad * (unpacked ? block_columns : panel_width);
  const int8_t* quads = tokens.codes + row * tokens.stride + block.first_quad * quad;
  const int32_t* sums = tokens.sums + row * panel.groups + block.first_group;
  for (int64_t group = 0; group * panel.group_quads < block.quads; ++group) {
    block.ahead->fetch();
    const int64_t at = group * block_columns;
    __m512i dot[Rows][tile_vectors];
    const auto multiply_quads = [&](int64_t n) INLINE_LAMBDA {
      for (; n > 0; --n) {
        __m512i w[tile_vectors];
        UNROLL for (int t = 0; t < tile_vectors; ++t) w[t] = _mm512_loadu_si512(bytes + t * 64);
        multiply_quad(w, quads, tokens.stride, dot);
        bytes += step;
        quads += quad;
      }
    };
    const int64_t count = panel.quads_in(block.first_group + group);
    if constexpr (rest == Rest::zeros) {
      UNROLL for (int r = 0; r < Rows; ++r) {
        UNROLL for (int t = 0; t < tile_vectors; ++t) dot[r][t] = _mm512_setzero_si512();
      }
      // Token by token between the products, whose ports this leaves alone: all at once would keep them waiting.
      const int64_t share = count / Rows;
      UNROLL for (int r = 0; r < Rows; ++r) {
        multiply_quads(share);
        const int64_t index = (row + r) * panel.groups + block.first_group + group;
        const __m512i multiples = _mm512_load_si512(tokens.multiples + index * sum_multiples);
        UNROLL for (int t = 0; t < tile_vectors; ++t) {
          const __m512i zeros = _mm512_load_si512(block.zeros + at + t * tile_width);
          const __m512i upper_zeros = _mm512_load_si512(block.upper_zeros + at + t * tile_width);
          const __m512i low = _mm512_permutexvar_epi32(zeros, multiples);  // looks at the lower four bits
          const __m512i high = _mm512_slli_epi32(_mm512_permutexvar_epi32(upper_zeros, multiples), 4);
          dot[r][t] = _mm512_add_epi32(dot[r][t], _mm512_add_epi32(low, high));
        }
      }
      multiply_quads(count - share * Rows);
    } else {
      begin_group(sums + group, panel.groups, dot);
      multiply_quads(count);
    }
    end_group(block, group, dot, total);
    if constexpr (rest == Rest::shifts) add_shifts(block, group, sums + group, panel.groups, total);
  }
  end_tile(block, row, tokens.scales + row, total, totals);
}

template <Rest rest>
constexpr MultiplyTile<Tokens> multiply_tile_of[tile_rows + 1] = {nullptr,
                                                                  multiply_tile<1, rest>,
                                                                  multiply_tile<2, rest>,
                                                                  multiply_tile<3, rest>,
                                                                  multiply_tile<4, rest>,
                                                                  multiply_tile<5, rest>,
                                                                  multiply_tile<6, rest>};

template <int Bits>
void multiply_bits(const Panel& panel, const Tokens& tokens, const Output& output, void* scratch) {
  if constexpr (Bits == 2 || Bits == 4) {
    if (tokens.rows == 1) return multiply_one<Bits>(panel, tokens, output, scratch);
  }
  if (tokens.rows <= most_streamed_rows) {
    const int64_t parts = (tokens.rows + streamed_rows - 1) / streamed_rows;
    for (int64_t part = 0, row = 0; part < parts; ++part) {
      const int64_t rows = tokens.rows / parts + (part < tokens.rows % parts ? 1 : 0);
      stream_of<Bits>[rows](panel, tokens, row, output);
      row += rows;
    }
    return;
  }
  const Rest rest = rest_of(panel);
  const MultiplyTile<Tokens>* of_rows = rest == Rest::zeros    ? multiply_tile_of<Rest::zeros>
                                        : rest == Rest::shifts ? multiply_tile_of<Rest::shifts>
                                                               : multiply_tile_of<Rest::nothing>;
  const MultiplyTile<Tokens>* first_of_rows = nullptr;
  if constexpr (Bits != 8) first_of_rows = unpack_and_multiply_of<Bits>;
  multiply_blocks(panel, tokens, output, scratch, cut_by_groups(panel, 1), unpack_block<Bits>, of_rows, first_of_rows);
}

// ---- in floats ------------------------------------------------------------------------------------------------------

template <class T>
void widen_as(const T* x, int64_t in_features, float* values, int64_t stride) {
  for (int64_t k = 0; k < stride; k += 16) _mm512_store_ps(values + k, load16(x + k, first_lanes(in_features - k)));
}

void widen(const void* x, DType dtype, int64_t in_features, float* values, int64_t stride) {
  if (dtype == DType::f32) return widen_as(static_cast<const float*>(x), in_features, values, stride);
  if (dtype == DType::f16) return widen_as(static_cast<const Float16*>(x), in_features, values, stride);
  widen_as(static_cast<const BFloat16*>(x), in_features, values, stride);
}

template <int Bits>
void unpack_floats(const Panel& panel, const Block& block) {
  const Unpacker<Bits> unpack(block.column);
  const uint8_t* tile = panel.codes + (block.first_quad * 4 + block.column / tile_width) * 8 * Bits;
  float* to = static_cast<float*>(block.weights);
  const int64_t end = block.first_quad + block.quads;
  for (int64_t first = block.first_quad; first < end;) {
    const int64_t group = first / panel.group_quads, after = (group + 1) * panel.group_quads;
    const int64_t next = after < end ? after : end;
    __m512 scales[tile_vectors], zeros[tile_vectors];
    for (int t = 0; t < tile_vectors; ++t) {
      const int64_t column = block.column + t * tile_width;
      scales[t] = load_scales(panel, group, column);
      zeros[t] = load_zero_points(panel, group, column);
    }
    for (; first < next; ++first) {
      for (int t = 0; t < tile_vectors; ++t) {
        const __m512i codes = unpack(tile + t * 8 * Bits);
        UNROLL for (int k = 0; k < quad; ++k) {
          const __m512i code = _mm512_and_si512(_mm512_srli_epi32(codes, 8 * k), _mm512_set1_epi32(0xff));
          _mm512_store_ps(to + k * block_columns + t * tile_width, mul(scales[t], sub(widen(code), zeros[t])));
        }
      }
      tile += 4 * 8 * Bits;
      to += quad * block_columns;
    }
  }
}

// A block's products are summed on their own before they join the sums, which keeps rounding errors low in long rows.
template <int Rows>
void multiply_float_tile(const Panel&, const Block& block, const FloatTokens& tokens, int64_t row, float* totals) {
  block.ahead->fetch();
  __m512 sum[Rows][tile_vectors];
  UNROLL for (int r = 0; r < Rows; ++r) {
    UNROLL for (int t = 0; t < tile_vectors; ++t) sum[r][t] = _mm512_setzero_ps();
  }
  const float* w = static_cast<const float*>(block.weights);
  const float* x = tokens.values + row * tokens.stride + block.first_quad * quad;
  for (int64_t n = block.quads * quad; n > 0; --n, ++x, w += block_columns) {
    UNROLL for (int r = 0; r < Rows; ++r) {
      const __m512 a = broadcast(x[r * tokens.stride]);
      UNROLL for (int t = 0; t < tile_vectors; ++t) {
        sum[r][t] = multiply_add(a, _mm512_load_ps(w + t * tile_width), sum[r][t]);
      }
    }
  }
  __m512 total[Rows][tile_vectors];
  begin_tile(block, totals, total);
  UNROLL for (int r = 0; r < Rows; ++r) {
    UNROLL for (int t = 0; t < tile_vectors; ++t) total[r][t] = _mm512_add_ps(total[r][t], sum[r][t]);
  }
  end_tile(block, row, scales_of(tokens, row), total, totals);
}

constexpr MultiplyTile<FloatTokens> multiply_float_tile_of[tile_rows + 1] = {nullptr,
                                                                             multiply_float_tile<1>,
                                                                             multiply_float_tile<2>,
                                                                             multiply_float_tile<3>,
                                                                             multiply_float_tile<4>,
                                                                             multiply_float_tile<5>,
                                                                             multiply_float_tile<6>};

// ---- entry points ---------------------------------------------------------------------------------------------------

void multiply(const Panel& panel, const Tokens& tokens, const Output& output, void* scratch) {
  constexpr decltype(&multiply) of_bits[] = {nullptr,          multiply_bits<1>, multiply_bits<2>,
                                             multiply_bits<3>, multiply_bits<4>, multiply_bits<5>,
                                             multiply_bits<6>, multiply_bits<7>, multiply_bits<8>};
  of_bits[panel.bits](panel, tokens, output, scratch);
}

bool wants_multiples(int bits, Zeros kind, int64_t rows) {
  return rows > most_streamed_rows && has_zeros_apart(bits, kind);
}

int64_t scratch_bytes(const Panel& panel, int64_t rows) {
  const int64_t arranged = (panel.quads * quad + 63) / 64 * 64;  // of one token
  const int64_t blocks = scratch_bytes(panel, rows, cut_by_groups(panel, 1));
  return blocks > arranged ? blocks : arranged;
}

void multiply_float(const Panel& panel, const FloatTokens& tokens, const Output& output, void* scratch) {
  constexpr UnpackBlock of_bits[] = {nullptr,          unpack_floats<1>, unpack_floats<2>,
                                     unpack_floats<3>, unpack_floats<4>, unpack_floats<5>,
                                     unpack_floats<6>, unpack_floats<7>, unpack_floats<8>};
  multiply_blocks(panel, tokens, output, scratch, cut_evenly(panel, sizeof(float)), of_bits[panel.bits],
                  multiply_float_tile_of);
}

int64_t float_scratch_bytes(const Panel& panel, int64_t rows) {
  return scratch_bytes(panel, rows, cut_evenly(panel, sizeof(float)));
}

}  // namespace
}  // namespace avx512vnni

extern const Kernels avx512vnni_kernels;
const Kernels avx512vnni_kernels = {avx512vnni::quantize,
                                    avx512vnni::sum_groups,
                                    avx512vnni::multiply,
                                    avx512vnni::scratch_bytes,
                                    avx512vnni::widen,
                                    avx512vnni::multiply_float,
                                    avx512vnni::float_scratch_bytes,
                                    avx512vnni::wants_multiples,
                                    avx512vnni::multiply_sums};

}  // namespace fastembed::qmatmul
