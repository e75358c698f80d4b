#include <immintrin.h>

#include "search/project_kernels.hpp"

namespace fastembed::search {
namespace avx512 {
namespace {

using Vec = __m512;
constexpr int lanes = 16;
constexpr int tile_rows = 14;

#define INLINE inline __attribute__((always_inline))
INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
INLINE Vec broadcast(float f) { return _mm512_set1_ps(f); }
INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

#include "search/project.inl"

}  // namespace
}  // namespace avx512

extern const ProjectKernels avx512_project_kernels;
const ProjectKernels avx512_project_kernels{avx512::project, avx512::accumulate};

}  // namespace fastembed::search
