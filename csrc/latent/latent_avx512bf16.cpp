#include <immintrin.h>

#include "latent/kernels.hpp"
#include "qmatmul/kernels.hpp"

namespace fastembed::latent {
namespace avx512bf16 {
namespace {

#define FASTEMBED_DOT_BF16(sum, x, w)                                                                        \
  reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),                                      \
                                         reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x))), \
                                         reinterpret_cast<__m512bh>(w)))

#include "latent/avx512.inl"

}  // namespace
}  // namespace avx512bf16

extern const Kernels avx512bf16_kernels;
const Kernels avx512bf16_kernels = avx512bf16::table;

}  // namespace fastembed::latent
