// Products of float32 rows with a matrix of few hundred columns, which stays in the cache: what encodings that start
// from embeddings (fixed dimensional encodings, relative representations) spend their time on.
#pragma once

#include <cstdint>

namespace fastembed::search {

constexpr int64_t panel_columns = 16;

struct ProjectKernels {
  // out[r, c] = sum over d of x[r, d] * panel[d, c], d ascending in one running sum, for c < columns <= panel_columns:
  // the same bits for a row whatever rows stand around it.
  void (*project)(const float* x, int64_t rows, int64_t row_stride, const float* panel, int64_t dim, float* out,
                  int64_t out_stride, int64_t columns);
  // sum[i] += x[i].
  void (*accumulate)(float* sum, const float* x, int64_t count);
};

}  // namespace fastembed::search
