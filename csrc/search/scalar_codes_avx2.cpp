#include <immintrin.h>

#include "search/scalar_codes_kernels.hpp"
#include "search/score.hpp"

namespace fastembed::search::avx2 {
namespace {

#include "search/scalar_codes.inl"

struct Eight {
  using Word = __m256i;
  using Floats = __m256;
  static constexpr int64_t lanes = 8;

  static Word zero() { return _mm256_setzero_si256(); }
  static Word load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Word low_halves(Word a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
  static Word high_halves(Word a) { return low_halves(_mm256_srli_epi32(a, 4)); }
  static Word four_bytes(const uint8_t* query) {
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

  static Floats to_floats(Word a) { return _mm256_cvtepi32_ps(a); }
  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
  static Floats all(float a) { return _mm256_set1_ps(a); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static uint32_t above(Floats a, float limit) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, all(limit), _CMP_GT_OQ)));
  }

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
  static Word add_words(Word a, Word b) { return _mm256_add_epi32(a, b); }
  static Word shift_left(Word a, int count) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(count)); }
  static void store(uint32_t* p, Word a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
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

}  // namespace

const ScalarKernels scalar_kernels = {ScalarCodeKernels<Eight>::scan, &ScalarLookupKernels<Eight>::table};

}  // namespace fastembed::search::avx2
