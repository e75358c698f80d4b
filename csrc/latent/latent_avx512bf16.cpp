#include <immintrin.h>

#include "latent/kernels.hpp"
#include "qmatmul/kernels.hpp"

namespace fastembed::latent {
namespace avx512bf16 {
namespace {

constexpr int vector_bytes = 64;
constexpr int tile_rows = 14;

#define FASTEMBED_DOT_BF16(sum, x, w)                                                                        \
  reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),                                      \
                                         reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x))), \
                                         reinterpret_cast<__m512bh>(w)))

#define FASTEMBED_LOOK_UP(table, segments)                                                                  \
  reinterpret_cast<Vec>(_mm512_permutex2var_ps(_mm512_loadu_ps(table), reinterpret_cast<__m512i>(segments), \
                                               _mm512_loadu_ps((table) + 16)))

#include "latent/kernels.inl"

}  // namespace
}  // namespace avx512bf16

extern const Kernels avx512bf16_kernels;
const Kernels avx512bf16_kernels = avx512bf16::table;

}  // namespace fastembed::latent
