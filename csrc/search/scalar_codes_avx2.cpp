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

  static Floats to_floats(Word a) { return _mm256_cvtepi32_ps(a); }
  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
  static Floats all(float a) { return _mm256_set1_ps(a); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static uint32_t above(Floats a, float limit) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, all(limit), _CMP_GT_OQ)));
  }
};

}  // namespace

const ScalarKernels scalar_kernels = {ScalarCodeKernels<Eight>::scan};

}  // namespace fastembed::search::avx2
