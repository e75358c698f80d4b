// AVX-VNNI: the AVX2 kernels with four products of an unsigned and a signed byte, and their sum, in one instruction
// that does not saturate.
#include <immintrin.h>

#include "qmatmul/kernels.hpp"

#define INLINE inline __attribute__((always_inline))

namespace fastembed::qmatmul {
namespace avxvnni {
namespace {

struct DotProducts {
  static constexpr bool takes_signed_bytes = false;
  static constexpr int quads = 1;
  static INLINE __m256i begin(__m256i dot) { return dot; }
  static INLINE __m256i add(__m256i sum, __m256i weights, __m256i a) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, weights, a);
#else  // tests/test_avxvnni.py, on CPUs that have the instruction in its other encoding only
    return _mm256_dpbusd_epi32(sum, weights, a);
#endif
  }
  static INLINE __m256i end(__m256i, __m256i sum) { return sum; }
};

template <int>
using ProductsOf = DotProducts;

#include "qmatmul/avx2.inl"

}  // namespace
}  // namespace avxvnni

extern const Kernels avxvnni_kernels;
const Kernels avxvnni_kernels = {avxvnni::quantize,           avxvnni::sum_groups, avxvnni::multiply,
                                 avxvnni::scratch_bytes,      avxvnni::widen,      avxvnni::multiply_float,
                                 avxvnni::float_scratch_bytes};

}  // namespace fastembed::qmatmul
