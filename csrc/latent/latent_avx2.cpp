#include <immintrin.h>

#include "latent/kernels.hpp"
#include "qmatmul/kernels.hpp"

namespace fastembed::latent {
namespace avx2 {
namespace {

constexpr int vector_bytes = 32;
constexpr int tile_rows = 6;

#define FASTEMBED_LOOK_UP(table, segments) \
  reinterpret_cast<Vec>(_mm256_i32gather_ps(table, reinterpret_cast<__m256i>(segments), 4))

#include "latent/kernels.inl"

}  // namespace
}  // namespace avx2

extern const Kernels avx2_kernels;
const Kernels avx2_kernels = avx2::table;

}  // namespace fastembed::latent
