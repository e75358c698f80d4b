#include <immintrin.h>

#include "search/kernels.hpp"
#include "search/score.hpp"

namespace fastembed::search::avx2 {
namespace {

#include "search/bit_kernels.inl"
#include "search/level_kernels.inl"

// Up to 8 bytes, the rest zero.
inline uint64_t load_word(const uint8_t* bytes, int64_t count) {
  uint64_t word = 0;
  __builtin_memcpy(&word, bytes, static_cast<unsigned long>(count));
  return word;
}

// The first `count` of eight floats, the rest zero.
inline __m256 load_floats(const float* p, int64_t count) {
  if (count >= 8) return _mm256_loadu_ps(p);
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane));
}

// Lanes, of the first `count`, of float scores larger than the limit.
inline uint32_t scores_above(__m256i dots, const float* inverse_norms, int64_t count, float query_inverse_norm,
                             float limit, float* score) {
  const __m256 code = load_floats(inverse_norms, count);
  const __m256 scores =
      _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(dots), code), _mm256_set1_ps(query_inverse_norm));
  const int above = _mm256_movemask_ps(_mm256_cmp_ps(scores, _mm256_set1_ps(limit), _CMP_GT_OQ));
  if (__builtin_expect(above == 0, 1)) return 0;
  _mm256_storeu_ps(score, scores);
  return static_cast<uint32_t>(count >= 8 ? above : above & ((1 << count) - 1));
}

struct Word256 {
  using Word = __m256i;
  static constexpr int64_t lanes = 4;
  static constexpr int64_t query_group = 2;

  static Word zero() { return _mm256_setzero_si256(); }
  static Word splat(int64_t a) { return _mm256_set1_epi64x(a); }
  static Word load(const uint64_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(uint64_t* p, Word a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static Word broadcast(const uint64_t* p) { return _mm256_set1_epi64x(static_cast<long long>(*p)); }
  static Word add(Word a, Word b) { return _mm256_add_epi64(a, b); }
  static Word unite(Word a, Word b) { return _mm256_or_si256(a, b); }
  static bool any_negative(Word a) { return _mm256_movemask_pd(_mm256_castsi256_pd(a)) != 0; }
  static Word exclusive_or(Word a, Word b) { return _mm256_xor_si256(a, b); }
  static Word exclusive_or(Word a, Word b, Word c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
  static Word majority(Word a, Word b, Word c) {
    return _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(c, _mm256_or_si256(a, b)));
  }
  static Word xor_of_and(Word a, Word b, Word c) { return _mm256_xor_si256(a, _mm256_and_si256(b, c)); }
  static Word xor_of_or(Word a, Word b, Word c) { return _mm256_xor_si256(a, _mm256_or_si256(b, c)); }
  static Word carry(Word sum, Word differ, Word first) {
    return _mm256_or_si256(_mm256_andnot_si256(sum, differ), _mm256_andnot_si256(differ, first));
  }
  static Word carry_of_sums(Word sum, Word a, Word b) { return carry(sum, _mm256_xor_si256(a, b), a); }

  // Counts of the two halves of each byte by table (Mula's method), summed over the bytes of a lane.
  static Word popcount(Word a) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2,
                                           2, 3, 2, 3, 3, 4);
    const __m256i half = _mm256_set1_epi8(15);
    const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(a, half));
    const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(a, 4), half));
    return _mm256_sad_epu8(_mm256_add_epi8(low, high), _mm256_setzero_si256());
  }

  static void gather(const uint8_t* row, int64_t stride, int64_t rows, int64_t bytes, uint64_t* block, int64_t step) {
    for (int64_t done = 0; done < bytes; done += 8, block += step) {
      for (int64_t i = 0; i < lanes; ++i) {
        const uint8_t* const source = row + i * stride + done;
        block[i] = i >= rows ? 0 : bytes - done >= 8 ? load_word(source, 8) : load_word(source, bytes - done);
      }
    }
  }

  static uint32_t below(Word counts, uint32_t limit) {
    const __m256i less = _mm256_cmpgt_epi64(_mm256_set1_epi64x(limit), counts);
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(less)));
  }

  // Adds the lanes whose bit is set in `below`.
  static void add_lanes(Candidates& candidates, uint32_t below, Word counts, uint32_t first_id) {
    uint64_t count[lanes];
    store(count, counts);
    for (; below != 0; below &= below - 1) {
      const int lane = __builtin_ctz(below);
      add_candidate(candidates, static_cast<uint32_t>(count[lane]), first_id + static_cast<uint32_t>(lane));
    }
  }

  static uint32_t scores_above(int64_t largest, Word sum, const float* inverse_norms, int64_t count,
                               float query_inverse_norm, float limit, float* score) {
    const __m256i dots = _mm256_sub_epi64(_mm256_set1_epi64x(largest), _mm256_add_epi64(sum, sum));
    const __m256i low_halves = _mm256_permutevar8x32_epi32(dots, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
    float scores[8];
    const uint32_t above =
        avx2::scores_above(low_halves, inverse_norms, count < lanes ? count : lanes, query_inverse_norm, limit, scores);
    if (above != 0) __builtin_memcpy(score, scores, lanes * sizeof(float));
    return above;
  }
};

struct Dwords256 {
  using Word = __m256i;
  static constexpr int64_t lanes = 8;
  static constexpr int64_t query_group = 8;

  static Word zero() { return _mm256_setzero_si256(); }
  static Word load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(uint32_t* p, Word a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static Word select(uint32_t which, Word a, Word b) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(which));
    return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
  }
  template <int left>
  static Word shift(Word a) {
    return left >= 0 ? _mm256_slli_epi32(a, left) : _mm256_srli_epi32(a, -left);
  }
  static Word low_halves(Word a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
  static Word high_halves(Word a) { return low_halves(_mm256_srli_epi32(a, 4)); }

  static void gather(const uint8_t* row, int64_t stride, int64_t rows, int64_t bytes, uint32_t* block) {
    for (int64_t done = 0; done < bytes; done += 4, block += lanes) {
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t left = bytes - done < 4 ? bytes - done : 4;
        block[i] = i < rows ? static_cast<uint32_t>(load_word(row + i * stride + done, left)) : 0;
      }
    }
  }
  static Word four_bytes(const int8_t* query) {
    int32_t bytes;
    __builtin_memcpy(&bytes, query, sizeof bytes);
    return _mm256_set1_epi32(bytes);
  }
  // Two products of at most 15 * 128 fit 16 bits.
  static Word add_dot(Word sums, Word codes, Word query) {
    const __m256i pairs = _mm256_maddubs_epi16(codes, query);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  // Two products of 255 * 128 do not: one half of the codes after the other.
  static Word add_dot_wide(Word sums, Word codes, Word query) {
    const __m256i low = _mm256_maddubs_epi16(low_halves(codes), query);
    const __m256i high = _mm256_maddubs_epi16(high_halves(codes), query);
    return _mm256_add_epi32(sums, _mm256_add_epi32(_mm256_madd_epi16(low, _mm256_set1_epi16(1)),
                                                   _mm256_madd_epi16(high, _mm256_set1_epi16(16))));
  }
  static Word add(Word a, Word b) { return _mm256_add_epi32(a, b); }
  static Word intersect(Word a, Word b) { return _mm256_and_si256(a, b); }
  // Whether a lane is 0 or more.
  static bool any_positive(Word a) { return _mm256_movemask_ps(_mm256_castsi256_ps(a)) != 0xff; }
  static Word splat(int32_t a) { return _mm256_set1_epi32(a); }
  static uint32_t scores_above(Word dots, const float* inverse_norms, int64_t count, float query_inverse_norm,
                               float limit, float* score) {
    return avx2::scores_above(dots, inverse_norms, count, query_inverse_norm, limit, score);
  }
};

using Bits = BitKernels<Word256>;
using Levels = LevelKernels<Dwords256>;

inline int64_t sum_of_lanes(__m256i a) {
  const __m128i halves = _mm_add_epi64(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  return _mm_cvtsi128_si64(halves) + _mm_extract_epi64(halves, 1);
}

// One query against rows as they lie.
void scan_rows(const Rows& codes, uint32_t first_id, const uint8_t* query, Candidates& candidates) {
  for (int64_t row = 0; row < codes.count; ++row) {
    const uint8_t* const code = codes.data + row * codes.stride;
    int64_t done = 0;
    __m256i counts = _mm256_setzero_si256();
    for (; done + 32 <= codes.bytes; done += 32) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code + done));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(query + done));
      counts = _mm256_add_epi64(counts, Word256::popcount(_mm256_xor_si256(a, b)));
    }
    int64_t distance = sum_of_lanes(counts);
    for (; done < codes.bytes; done += 8) {
      const int64_t left = codes.bytes - done < 8 ? codes.bytes - done : 8;
      distance += __builtin_popcountll(load_word(code + done, left) ^ load_word(query + done, left));
    }
    add_candidate(candidates, static_cast<uint32_t>(distance), first_id + static_cast<uint32_t>(row));
  }
}

}  // namespace

const Kernels kernels = {
    Bits::lanes,       Levels::lanes,     scan_rows,           Bits::pack_hamming,  Bits::scan_hamming,
    Bits::pack_planes, Bits::scan_planes, Levels::pack_levels, Levels::scan_levels,
};

}  // namespace fastembed::search::avx2
