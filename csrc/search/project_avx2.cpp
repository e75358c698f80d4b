#include <immintrin.h>

#include "search/project_kernels.hpp"

namespace fastembed::search {
namespace avx2 {
namespace {

using Vec = __m256;
constexpr int lanes = 8;
constexpr int tile_rows = 6;

#define INLINE inline __attribute__((always_inline))
INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
INLINE Vec broadcast(float f) { return _mm256_set1_ps(f); }
INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

#include "search/project.inl"

}  // namespace
}  // namespace avx2

extern const ProjectKernels avx2_project_kernels;
const ProjectKernels avx2_project_kernels{avx2::project, avx2::accumulate};

}  // namespace fastembed::search
