#include <immintrin.h>

#include "search/scalar_codes_kernels.hpp"
#include "search/score.hpp"

namespace fastembed::search::avx512vnni {
namespace {

#include "search/scalar_codes.inl"

struct Sixteen {
  using Word = __m512i;
  using Floats = __m512;
  static constexpr int64_t lanes = 16;

  static Word zero() { return _mm512_setzero_si512(); }
  static Word load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static Word low_halves(Word a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
  static Word high_halves(Word a) { return low_halves(_mm512_srli_epi32(a, 4)); }
  static Word four_bytes(const int8_t* query) {
    int32_t bytes;
    __builtin_memcpy(&bytes, query, sizeof bytes);
    return _mm512_set1_epi32(bytes);
  }
  static Word add_dot(Word sums, Word codes, Word query) { return _mm512_dpbusd_epi32(sums, codes, query); }
  static Word add_dot_wide(Word sums, Word codes, Word query) { return add_dot(sums, codes, query); }

  static Floats to_floats(Word a) { return _mm512_cvtepi32_ps(a); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
  static Floats all(float a) { return _mm512_set1_ps(a); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static uint32_t above(Floats a, float limit) { return _mm512_cmp_ps_mask(a, all(limit), _CMP_GT_OQ); }
};

}  // namespace

const ScalarKernels scalar_kernels = {ScalarCodeKernels<Sixteen>::scan};

}  // namespace fastembed::search::avx512vnni
