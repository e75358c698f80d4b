#include <immintrin.h>

#include "search/kernels.hpp"
#include "search/score.hpp"

namespace fastembed::search::avx2 {
namespace {

#include "search/dwords_avx2.inl"
#include "search/level_kernels.inl"
#include "search/level_packing.inl"
#include "search/lookups_avx2.inl"
#include "search/popcount_kernels.inl"

// Up to 8 bytes, the rest zero.
inline uint64_t load_word(const uint8_t* bytes, int64_t count) {
  uint64_t word = 0;
  __builtin_memcpy(&word, bytes, static_cast<unsigned long>(count));
  return word;
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

  // In the low half.
  static Dwords::Word to_dwords(Word a) {
    return _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  }
};

struct Planes : Dwords {
  static Word select(uint32_t which, Word a, Word b) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(which));
    return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
  }
  template <int left>
  static Word shift(Word a) {
    return left >= 0 ? _mm256_slli_epi32(a, left) : _mm256_srli_epi32(a, -left);
  }

  static void gather(const uint8_t* row, int64_t stride, int64_t rows, int64_t bytes, uint32_t* block) {
    for (int64_t done = 0; done < bytes; done += 4, block += lanes) {
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t left = bytes - done < 4 ? bytes - done : 4;
        block[i] = i < rows ? static_cast<uint32_t>(load_word(row + i * stride + done, left)) : 0;
      }
    }
  }
};

using Bits = BitKernels<Word256, Dwords>;
using Levels = LevelKernels<Dwords>;
using Packing = LevelPacking<Planes>;

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
    Bits::lanes,
    Levels::lanes,
    scan_rows,
    Bits::pack_hamming,
    Bits::scan_hamming,
    Bits::pack_planes,
    Bits::scan_planes,
    Packing::pack_levels,
    Packing::dim_of_level,
    Levels::scan_levels,
    &LookupKernels<LookupBytes>::table,
    nullptr,
};

}  // namespace fastembed::search::avx2
