#include <immintrin.h>

#include "search/scalar_codes_kernels.hpp"
#include "search/score.hpp"

namespace fastembed::search::avx2 {
namespace {

#include "search/dwords_avx2.inl"
#include "search/scalar_codes.inl"

struct Lookups : Dwords {
  static constexpr int lookup_queries = 4;
  static constexpr int64_t index_bits = 4, chunk_bytes = 2, chunk_groups = 4;

  static Word load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Word look_up(const uint8_t* table, Word index) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), index);
  }
  static Word add_bytes(Word a, Word b) { return _mm256_add_epi8(a, b); }
  static Word add_pairs(Word a, Word b) { return _mm256_add_epi16(a, b); }
  static Word subtract_pairs(Word a, Word b) { return _mm256_sub_epi16(a, b); }
  static Word odd_bytes(Word a) { return _mm256_srli_epi16(a, 8); }
  static Word to_odd_bytes(Word a) { return _mm256_slli_epi16(a, 8); }
  static Word shift_left(Word a, int count) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(count)); }
  // Sums of the even and of the odd bytes as words, four of each 128 bits at a time.
  static void widen(Word even, Word odd, Word (&words)[4]) {
    const Word low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
    words[0] = _mm256_unpacklo_epi16(low, zero());
    words[1] = _mm256_unpackhi_epi16(low, zero());
    words[2] = _mm256_unpacklo_epi16(high, zero());
    words[3] = _mm256_unpackhi_epi16(high, zero());
  }
  // The half bytes of the first two bytes of 32 words.
  static void indices(const uint64_t* words, uint8_t* out) {
    for (int byte = 0; byte < 2; ++byte, out += 64) {
      uint8_t bytes[32];
      for (int i = 0; i < 32; ++i) bytes[i] = static_cast<uint8_t>(words[i] >> (8 * byte));
      const Word both = load_bytes(bytes);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), low_halves(both));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32), high_halves(both));
    }
  }
};

using Codes = ScalarCodeKernels<Dwords>;

}  // namespace

const ScalarKernels scalar_kernels = {Codes::scan, Codes::lay_out, Codes::offer_rows,
                                      &ScalarLookupKernels<Lookups>::table};

}  // namespace fastembed::search::avx2
