// AVX-512 with VPOPCNTDQ, VBMI and VNNI.

#include <immintrin.h>

#include "search/kernels.hpp"
#include "search/score.hpp"

namespace fastembed::search::avx512vnni {
namespace {

#include "search/bit_kernels.inl"
#include "search/level_kernels.inl"

inline __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1; }

inline __m512i load_bytes(const uint8_t* p, __mmask64 mask) { return _mm512_maskz_loadu_epi8(mask, p); }

// Eight rows of eight words become, word by word, the words of all rows.
inline void transpose(__m512i (&rows)[8]) {
  __m512i pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm512_unpacklo_epi64(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi64(rows[i], rows[i + 1]);
  }
  for (int half = 0; half < 8; half += 4) {
    for (int i = 0; i < 2; ++i) {
      quads[half + i] = _mm512_shuffle_i64x2(pairs[half + i], pairs[half + 2 + i], 0x88);
      quads[half + 2 + i] = _mm512_shuffle_i64x2(pairs[half + i], pairs[half + 2 + i], 0xdd);
    }
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i64x2(quads[i], quads[4 + i], 0x88);
    rows[4 + i] = _mm512_shuffle_i64x2(quads[i], quads[4 + i], 0xdd);
  }
}

// Lanes of float scores larger than the limit; writes the scores only if there are any.
inline uint32_t scores_above(__m256 dots, const float* inverse_norms, int64_t count, float query_inverse_norm,
                             float limit, float* score) {
  const auto lanes = static_cast<__mmask8>(first_bytes(count));
  const __m256 code = _mm256_maskz_loadu_ps(lanes, inverse_norms);
  const __m256 scores = _mm256_mul_ps(_mm256_mul_ps(dots, code), _mm256_set1_ps(query_inverse_norm));
  const uint32_t above = _mm256_mask_cmp_ps_mask(lanes, scores, _mm256_set1_ps(limit), _CMP_GT_OQ);
  if (__builtin_expect(above != 0, 0)) _mm256_storeu_ps(score, scores);
  return above;
}

struct Word512 {
  using Word = __m512i;
  static constexpr int64_t lanes = 8;
  static constexpr int64_t query_group = 4;

  static Word zero() { return _mm512_setzero_si512(); }
  static Word splat(int64_t a) { return _mm512_set1_epi64(a); }
  static Word load(const uint64_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint64_t* p, Word a) { _mm512_storeu_si512(p, a); }
  static Word broadcast(const uint64_t* p) { return _mm512_set1_epi64(static_cast<long long>(*p)); }
  static Word add(Word a, Word b) { return _mm512_add_epi64(a, b); }
  static Word popcount(Word a) { return _mm512_popcnt_epi64(a); }
  static Word unite(Word a, Word b) { return _mm512_or_si512(a, b); }
  static bool any_negative(Word a) { return _mm512_movepi64_mask(a) != 0; }
  static Word exclusive_or(Word a, Word b) { return _mm512_xor_si512(a, b); }
  static Word exclusive_or(Word a, Word b, Word c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  static Word majority(Word a, Word b, Word c) { return _mm512_ternarylogic_epi64(a, b, c, 0xe8); }
  static Word xor_of_and(Word a, Word b, Word c) { return _mm512_ternarylogic_epi64(a, b, c, 0x78); }
  static Word xor_of_or(Word a, Word b, Word c) { return _mm512_ternarylogic_epi64(a, b, c, 0x1e); }
  static Word carry(Word sum, Word differ, Word first) { return _mm512_ternarylogic_epi64(differ, sum, first, 0x3a); }
  static Word carry_of_sums(Word sum, Word a, Word b) { return _mm512_ternarylogic_epi64(sum, a, b, 0x8e); }

  static void gather(const uint8_t* row, int64_t stride, int64_t rows, int64_t bytes, uint64_t* block, int64_t step) {
    for (int64_t done = 0; done < bytes; done += 64) {
      const __mmask64 mask = first_bytes(bytes - done);
      __m512i words[8];
#pragma GCC unroll 8
      for (int64_t i = 0; i < 8; ++i) {
        words[i] = i < rows ? load_bytes(row + i * stride + done, mask) : _mm512_setzero_si512();
      }
      transpose(words);
      for (int64_t i = 0; i < 8 && done + 8 * i < bytes; ++i, block += step) _mm512_storeu_si512(block, words[i]);
    }
  }

  static uint32_t below(Word counts, uint32_t limit) {
    return _mm512_cmplt_epu64_mask(counts, _mm512_set1_epi64(limit));
  }

  // Adds the lanes whose bit is set in `below`.
  static void add_lanes(Candidates& candidates, uint32_t below, Word counts, uint32_t first_id) {
    const __m512i ids = _mm512_add_epi64(_mm512_set1_epi64(first_id), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
    const __m512i entries = _mm512_or_si512(_mm512_slli_epi64(counts, 32), ids);
    const __m512i packed = _mm512_maskz_compress_epi64(static_cast<__mmask8>(below), entries);
    _mm512_storeu_si512(candidates.entries + candidates.count, packed);
    count_added(candidates, __builtin_popcount(below));
  }

  static uint32_t scores_above(int64_t largest, Word sum, const float* inverse_norms, int64_t count,
                               float query_inverse_norm, float limit, float* score) {
    const __m512i dots = _mm512_sub_epi64(_mm512_set1_epi64(largest), _mm512_add_epi64(sum, sum));
    return avx512vnni::scores_above(_mm512_cvtepi64_ps(dots), inverse_norms, count, query_inverse_norm, limit, score);
  }
};

struct Dwords512 {
  using Word = __m512i;
  static constexpr int64_t lanes = 16;
  static constexpr int64_t query_group = 8;

  static Word zero() { return _mm512_setzero_si512(); }
  static Word load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint32_t* p, Word a) { _mm512_storeu_si512(p, a); }
  static Word select(uint32_t which, Word a, Word b) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(which)), a, b, 0xca);
  }
  template <int left>
  static Word shift(Word a) {
    return left >= 0 ? _mm512_slli_epi32(a, left) : _mm512_srli_epi32(a, -left);
  }
  static Word low_halves(Word a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
  static Word high_halves(Word a) { return low_halves(_mm512_srli_epi32(a, 4)); }

  // Up to 64 bytes of 16 rows: transposed by 64-bit words eight rows at a time, then the halves of the words parted.
  static void gather(const uint8_t* row, int64_t stride, int64_t rows, int64_t bytes, uint32_t* block) {
    const __mmask64 mask = first_bytes(bytes);
    __m512i words[2][8];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const int64_t r = 8 * half + i;
        words[half][i] = r < rows ? load_bytes(row + r * stride, mask) : _mm512_setzero_si512();
      }
      transpose(words[half]);
    }
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      _mm512_storeu_si512(block + 2 * i * lanes, _mm512_permutex2var_epi32(words[0][i], even, words[1][i]));
      _mm512_storeu_si512(block + (2 * i + 1) * lanes, _mm512_permutex2var_epi32(words[0][i], odd, words[1][i]));
    }
  }

  static Word four_bytes(const int8_t* query) {
    int32_t bytes;
    __builtin_memcpy(&bytes, query, sizeof bytes);
    return _mm512_set1_epi32(bytes);
  }
  static Word add_dot(Word sums, Word codes, Word query) { return _mm512_dpbusd_epi32(sums, codes, query); }
  static Word add_dot_wide(Word sums, Word codes, Word query) { return add_dot(sums, codes, query); }
  static Word add(Word a, Word b) { return _mm512_add_epi32(a, b); }
  static Word intersect(Word a, Word b) { return _mm512_and_si512(a, b); }
  // Whether a lane is 0 or more.
  static bool any_positive(Word a) { return _mm512_movepi32_mask(a) != 0xffff; }
  static Word splat(int32_t a) { return _mm512_set1_epi32(a); }
  static uint32_t scores_above(Word dots, const float* inverse_norms, int64_t count, float query_inverse_norm,
                               float limit, float* score) {
    const auto lane_mask = static_cast<__mmask16>(first_bytes(count));
    const __m512 code = _mm512_maskz_loadu_ps(lane_mask, inverse_norms);
    const __m512 query = _mm512_set1_ps(query_inverse_norm);
    const __m512 scores = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dots), code), query);
    const uint32_t above = _mm512_mask_cmp_ps_mask(lane_mask, scores, _mm512_set1_ps(limit), _CMP_GT_OQ);
    if (__builtin_expect(above != 0, 0)) _mm512_storeu_ps(score, scores);
    return above;
  }
};

using Bits = BitKernels<Word512>;
using Levels = LevelKernels<Dwords512>;

// One query against rows as they lie, eight rows at a time. The popcounts of a row, at most 64 for each of up to three
// words, fit a byte per 64-bit lane: shifted by a byte per row they merge into one register, which vpermb turns so that
// each lane holds the eight counts of one row, for vpsadbw to sum. Rows from `rows` on repeat the first.
template <int words>
inline __m512i distances_of_eight(const uint8_t* row, int64_t stride, int64_t rows, const __m512i (&query)[3],
                                  __mmask64 last_mask) {
  __m512i merged = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const uint8_t* const code = row + (i < rows ? i * stride : 0);
    __m512i counts =
        _mm512_popcnt_epi64(_mm512_xor_si512(load_bytes(code + 64 * (words - 1), last_mask), query[words - 1]));
#pragma GCC unroll 2
    for (int w = 0; w < words - 1; ++w) {
      const __m512i word = _mm512_xor_si512(_mm512_loadu_si512(code + 64 * w), query[w]);
      counts = _mm512_add_epi64(counts, _mm512_popcnt_epi64(word));
    }
    merged = _mm512_or_si512(merged, _mm512_slli_epi64(counts, 8 * i));
  }
  // Byte `lane` of the result's lane `row` is byte `row` of lane `lane`.
  constexpr int64_t each = 0x0101010101010101;
  const __m512i turn =
      _mm512_add_epi8(_mm512_set1_epi64(0x3830282018100800),
                      _mm512_set_epi64(7 * each, 6 * each, 5 * each, 4 * each, 3 * each, 2 * each, each, 0));
  return _mm512_sad_epu8(_mm512_permutexvar_epi8(turn, merged), _mm512_setzero_si512());
}

// Any width: rows one after the other, so that memory is read in one stream, and their sums added up together.
inline __m512i distances_of_long_rows(const uint8_t* row, int64_t stride, int64_t rows, int64_t bytes,
                                      const uint8_t* query) {
  __m512i counts[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const uint8_t* const code = row + (i < rows ? i * stride : 0);
    counts[i] = _mm512_setzero_si512();
    for (int64_t done = 0; done < bytes; done += 64) {
      const __mmask64 mask = first_bytes(bytes - done);
      const __m512i word = _mm512_xor_si512(load_bytes(code + done, mask), load_bytes(query + done, mask));
      counts[i] = _mm512_add_epi64(counts[i], _mm512_popcnt_epi64(word));
    }
  }
  transpose(counts);
  for (int step = 1; step < 8; step *= 2) {
    for (int i = 0; i < 8; i += 2 * step) counts[i] = _mm512_add_epi64(counts[i], counts[i + step]);
  }
  return counts[0];
}

// `distances(row, rows)` gives the distances of up to eight rows.
template <class Distances>
inline void collect(const Rows& codes, uint32_t first_id, Candidates& candidates, const Distances& distances) {
  const auto collect_eight = [&](int64_t row, int64_t rows) {
    const __m512i found = distances(codes.data + row * codes.stride, rows);
    const uint32_t below = Word512::below(found, candidates.limit) & static_cast<uint32_t>(first_bytes(rows));
    if (__builtin_expect(below == 0, 1)) return;
    Word512::add_lanes(candidates, below, found, first_id + static_cast<uint32_t>(row));
  };
  int64_t row = 0;
  for (; row + 8 <= codes.count; row += 8) collect_eight(row, 8);
  if (row < codes.count) collect_eight(row, codes.count - row);
}

template <int words>
void scan_short_rows(const Rows& codes, uint32_t first_id, const uint8_t* query, Candidates& candidates) {
  const __mmask64 last_mask = first_bytes(codes.bytes - 64 * (words - 1));
  __m512i query_words[3] = {};
  for (int w = 0; w < words; ++w) {
    query_words[w] = load_bytes(query + 64 * w, w == words - 1 ? last_mask : ~__mmask64{0});
  }
  collect(codes, first_id, candidates, [&](const uint8_t* row, int64_t rows) {
    return distances_of_eight<words>(row, codes.stride, rows, query_words, last_mask);
  });
}

void scan_rows(const Rows& codes, uint32_t first_id, const uint8_t* query, Candidates& candidates) {
  if (codes.bytes <= 64) return scan_short_rows<1>(codes, first_id, query, candidates);
  if (codes.bytes <= 128) return scan_short_rows<2>(codes, first_id, query, candidates);
  if (codes.bytes <= 192) return scan_short_rows<3>(codes, first_id, query, candidates);
  collect(codes, first_id, candidates, [&](const uint8_t* row, int64_t rows) {
    return distances_of_long_rows(row, codes.stride, rows, codes.bytes, query);
  });
}

}  // namespace

const Kernels kernels = {
    Bits::lanes,       Levels::lanes,     scan_rows,           Bits::pack_hamming,  Bits::scan_hamming,
    Bits::pack_planes, Bits::scan_planes, Levels::pack_levels, Levels::scan_levels,
};

}  // namespace fastembed::search::avx512vnni
