#pragma once

#include <algorithm>
#include <cstdint>

namespace fastembed::search {

// In eight running sums, so that the order of the additions is the same on every machine.
inline double sum_of_squares(const float* x, int64_t dim) {
  double sums[8] = {};
  for (int64_t d = 0; d < dim; d += 8) {
    for (int64_t j = 0; j < std::min<int64_t>(8, dim - d); ++j) sums[j] += static_cast<double>(x[d + j]) * x[d + j];
  }
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

}  // namespace fastembed::search
