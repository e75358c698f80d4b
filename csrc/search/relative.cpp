#include "search/relative.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/divide_up.hpp"
#include "common/half.hpp"
#include "common/threading.hpp"
#include "search/project.hpp"
#include "search/sum_of_squares.hpp"

namespace fastembed::search {
namespace {

constexpr int64_t rows_per_task = 56;
// As torch.nn.functional.normalize has it.
constexpr double smallest_norm = 1e-12;

// The row as float32, to unit length.
void unit_row(const void* x, DType dtype, int64_t row, int64_t dim, float* unit) {
  if (dtype == DType::f32) {
    std::copy_n(static_cast<const float*>(x) + row * dim, dim, unit);
  } else {
    for (int64_t d = 0; d < dim; ++d) unit[d] = load_scalar(x, dtype, row * dim + d);
  }
  const auto factor = static_cast<float>(1 / std::max(std::sqrt(sum_of_squares(unit, dim)), smallest_norm));
  for (int64_t d = 0; d < dim; ++d) unit[d] *= factor;
}

}  // namespace

void relative_representations(const void* x, int64_t rows, const void* anchors, int64_t anchor_rows, int64_t dim,
                              DType dtype, void* out, int threads) {
  std::vector<float> units(static_cast<size_t>(anchor_rows * dim));
  for (int64_t a = 0; a < anchor_rows; ++a) unit_row(anchors, dtype, a, dim, units.data() + a * dim);
  const Panels panels(units.data(), dim, anchor_rows, 1, dim);
  const ProjectKernels& kernels = project_kernels();
  parallel_for(divide_up(rows, rows_per_task), threads, [&](int64_t task) {
    thread_local std::vector<float> tile;
    const int64_t first = task * rows_per_task;
    const int64_t count = std::min(rows_per_task, rows - first);
    tile.resize(static_cast<size_t>(rows_per_task * (dim + anchor_rows)));
    const int64_t place = first * anchor_rows;
    float* const cosines = dtype == DType::f32 ? static_cast<float*>(out) + place : tile.data() + rows_per_task * dim;
    for (int64_t r = 0; r < count; ++r) unit_row(x, dtype, first + r, dim, tile.data() + r * dim);
    panels.project(kernels, tile.data(), count, dim, cosines, anchor_rows);
    if (dtype == DType::f32) return;
    for (int64_t i = 0; i < count * anchor_rows; ++i) store_scalar(out, dtype, place + i, cosines[i]);
  });
}

}  // namespace fastembed::search
