// AVX2. vpmaddubsw adds two products of an unsigned and a signed byte in 16 bits, saturating, so the unsigned ones must
// stay small:
//   up to 7 bits   code times activation: at most 2 * 127 * 127; the fewer the bits, the more such sums still fit in 16
//                  bits together, and only then are they widened;
//   8 bits         |code - 128| times the activation with the sign of code - 128: at most 2 * 128 * 127.
#include <immintrin.h>

#include "qmatmul/kernels.hpp"

#define INLINE inline __attribute__((always_inline))

namespace fastembed::qmatmul {
namespace avx2 {
namespace {

template <int Quads, bool Signed>
struct PairProducts {
  static constexpr bool takes_signed_bytes = Signed;
  static constexpr int quads = Quads;
  static INLINE __m256i begin(__m256i) { return _mm256_setzero_si256(); }
  static INLINE __m256i add(__m256i sum, __m256i weights, __m256i a) {
    if (Signed) a = _mm256_sign_epi8(a, weights);
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(Signed ? _mm256_abs_epi8(weights) : weights, a));
  }
  static INLINE __m256i end(__m256i dot, __m256i sum) {
    return _mm256_add_epi32(dot, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
  }
};

// How many sums of two products fit in 16 bits together.
constexpr int quads_at_once(int bits) { return bits <= 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1; }

template <int Bits>
using ProductsOf = PairProducts<quads_at_once(Bits), Bits == 8>;

#include "qmatmul/avx2.inl"

}  // namespace
}  // namespace avx2

extern const Kernels avx2_kernels;
const Kernels avx2_kernels = {avx2::quantize, avx2::sum_groups,     avx2::multiply,           avx2::scratch_bytes,
                              avx2::widen,    avx2::multiply_float, avx2::float_scratch_bytes};

}  // namespace fastembed::qmatmul
