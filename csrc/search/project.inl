// The kernels of project_kernels.hpp for one level. A file project_<level>.cpp includes this inside its own anonymous
// namespace after defining
//   Vec, lanes             a vector of floats
//   load(p), store(p, v), broadcast(f), add(a, b), multiply_add(a, b, c) = a * b + c
//   tile_rows              rows whose sums of one panel fit in registers

constexpr int panel_vectors = 16 / lanes;

template <int rows>
inline __attribute__((always_inline)) void project_tile(const float* x, int64_t row_stride, const float* panel,
                                                        int64_t dim, float* out, int64_t out_stride, int64_t columns) {
  Vec sums[rows][panel_vectors];
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < panel_vectors; ++v) sums[r][v] = broadcast(0.f);
  }
  for (int64_t d = 0; d < dim; ++d) {
    Vec values[panel_vectors];
    for (int v = 0; v < panel_vectors; ++v) values[v] = load(panel + d * 16 + v * lanes);
    for (int r = 0; r < rows; ++r) {
      const Vec factor = broadcast(x[r * row_stride + d]);
      for (int v = 0; v < panel_vectors; ++v) sums[r][v] = multiply_add(factor, values[v], sums[r][v]);
    }
  }
  for (int r = 0; r < rows; ++r) {
    float row[16];
    float* const to = columns == 16 ? out + r * out_stride : row;
    for (int v = 0; v < panel_vectors; ++v) store(to + v * lanes, sums[r][v]);
    if (to != row) continue;
    for (int64_t c = 0; c < columns; ++c) out[r * out_stride + c] = row[c];
  }
}

void project(const float* x, int64_t rows, int64_t row_stride, const float* panel, int64_t dim, float* out,
             int64_t out_stride, int64_t columns) {
  for (; rows >= tile_rows; rows -= tile_rows) {
    project_tile<tile_rows>(x, row_stride, panel, dim, out, out_stride, columns);
    x += tile_rows * row_stride;
    out += tile_rows * out_stride;
  }
  for (; rows > 0; --rows, x += row_stride, out += out_stride) {
    project_tile<1>(x, row_stride, panel, dim, out, out_stride, columns);
  }
}

void accumulate(float* sum, const float* x, int64_t count) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(sum + i, add(load(sum + i), load(x + i)));
  for (; i < count; ++i) sum[i] += x[i];
}
