#include <immintrin.h>

#include "latent/kernels.hpp"
#include "qmatmul/kernels.hpp"

namespace fastembed::latent {
namespace avx512 {
namespace {

constexpr int vector_bytes = 64;
constexpr int tile_rows = 14;

#define FASTEMBED_LOOK_UP(table, segments)                                                                  \
  reinterpret_cast<Vec>(_mm512_permutex2var_ps(_mm512_loadu_ps(table), reinterpret_cast<__m512i>(segments), \
                                               _mm512_loadu_ps((table) + 16)))

#include "latent/kernels.inl"

}  // namespace
}  // namespace avx512

extern const Kernels avx512_kernels;
const Kernels avx512_kernels = avx512::table;

}  // namespace fastembed::latent
