#include <cstring>

#include "search/project_kernels.hpp"

namespace fastembed::search {
namespace generic {
namespace {

// Four floats in whatever vectors the target has.
typedef float Vec __attribute__((vector_size(16)));
constexpr int lanes = 4;
constexpr int tile_rows = 2;

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec broadcast(float f) { return Vec{f, f, f, f}; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }

#include "search/project.inl"

}  // namespace
}  // namespace generic

extern const ProjectKernels generic_project_kernels;
const ProjectKernels generic_project_kernels{generic::project, generic::accumulate};

}  // namespace fastembed::search
