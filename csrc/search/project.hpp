// A matrix that rows are multiplied with, rearranged for the kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "search/project_kernels.hpp"

namespace fastembed::search {

const ProjectKernels& project_kernels();

// A matrix [dim, columns] rearranged into panels of 16 columns, the last one filled up with zeros.
class Panels {
 public:
  // Element (d, c) is data[d * row_stride + c * column_stride].
  Panels(const float* data, int64_t dim, int64_t columns, int64_t row_stride, int64_t column_stride);

  // out [rows, columns] = x [rows, dim] times the matrix.
  void project(const ProjectKernels& kernels, const float* x, int64_t rows, int64_t row_stride, float* out,
               int64_t out_stride) const;

 private:
  int64_t dim_;
  int64_t columns_;
  std::vector<float> panels_;
};

}  // namespace fastembed::search
