#include "search/project.hpp"

#include <algorithm>

#include "common/divide_up.hpp"
#include "common/isa.hpp"

namespace fastembed::search {

extern const ProjectKernels generic_project_kernels;
#if defined(__x86_64__)
extern const ProjectKernels avx2_project_kernels;
extern const ProjectKernels avx512_project_kernels;
constexpr KernelsByIsa<ProjectKernels> by_isa{
    {&generic_project_kernels, &avx2_project_kernels, &avx512_project_kernels, nullptr}};
#else
constexpr KernelsByIsa<ProjectKernels> by_isa{{&generic_project_kernels, nullptr, nullptr, nullptr}};
#endif

const ProjectKernels& project_kernels() { return by_isa.active(); }

Panels::Panels(const float* data, int64_t dim, int64_t columns, int64_t row_stride, int64_t column_stride)
    : dim_(dim),
      columns_(columns),
      panels_(static_cast<size_t>(divide_up(columns, panel_columns) * dim * panel_columns)) {
  for (int64_t c = 0; c < columns; ++c) {
    float* const panel = panels_.data() + c / panel_columns * dim * panel_columns + c % panel_columns;
    for (int64_t d = 0; d < dim; ++d) panel[d * panel_columns] = data[d * row_stride + c * column_stride];
  }
}

void Panels::project(const ProjectKernels& kernels, const float* x, int64_t rows, int64_t row_stride, float* out,
                     int64_t out_stride) const {
  for (int64_t c = 0; c < columns_; c += panel_columns) {
    kernels.project(x, rows, row_stride, panels_.data() + c * dim_, dim_, out + c, out_stride,
                    std::min(panel_columns, columns_ - c));
  }
}

}  // namespace fastembed::search
