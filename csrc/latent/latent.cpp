// A tile of tokens goes through the block stage by stage, each stage parallel over panels of a weight or over rows.
// Every sum has a fixed order: over input features per output, and over the tokens of a sequence one after the other in
// double precision. So neither the number of threads nor what else stands in the batch shows in a result.
#include "latent/latent.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "common/divide_up.hpp"
#include "common/half.hpp"
#include "common/isa.hpp"
#include "common/threading.hpp"
#include "qmatmul/gate_table.hpp"

namespace fastembed::latent {

extern const Kernels generic_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512bf16_kernels;
#endif

namespace {

const Kernels& active_kernels() {
#if defined(__x86_64__)
  static const KernelsByIsa<Kernels> by_isa = {{&generic_kernels, &avx2_kernels, &avx512_kernels, nullptr}};
  if (has_avx512bf16()) return avx512bf16_kernels;
#else
  static const KernelsByIsa<Kernels> by_isa = {{&generic_kernels, nullptr, nullptr, nullptr}};
#endif
  return by_isa.active();
}

// Work below which another thread costs more than it brings, in multiply-adds and in elements.
constexpr int64_t multiply_grain = int64_t{1} << 20;
constexpr int64_t element_grain = int64_t{1} << 15;
constexpr int64_t most_rows = 16;

int useful_threads(int64_t work, int64_t grain, int threads) {
  return team_size(std::max<int64_t>(1, work / grain), threads);
}

int64_t panel_bytes(const Weight& weight) {
  return weight.dtype == DType::f32 ? weight.in_features * panel_width * 4
                                    : divide_up(weight.in_features, 2) * panel_width * 4;
}

// Which sequence a token belongs to, walking forward.
class Walk {
 public:
  Walk(const Tile& tile) : offsets_(tile.offsets), token_(tile.first), sequence_(0) {
    while (offsets_[sequence_ + 1] <= token_) ++sequence_;
  }
  int64_t next() {
    while (offsets_[sequence_ + 1] <= token_) ++sequence_;
    ++token_;
    return sequence_;
  }

 private:
  const int64_t* offsets_;
  int64_t token_;
  int64_t sequence_;
};

// Rows in the order that `multiply` reads them in.
class Packed {
 public:
  Packed(const Kernels& kernels, int64_t rows, int64_t features, DType dtype)
      : kernels_(kernels),
        rows_(rows),
        features_(features),
        dtype_(dtype),
        tile_words_(kernels.rows * (dtype == DType::f32 ? features : divide_up(features, 2))),
        words_(new float[tiles() * tile_words_]) {}

  int64_t tiles() const { return divide_up(rows_, kernels_.rows); }
  int64_t rows_in(int64_t tile) const { return std::min(kernels_.rows, rows_ - tile * kernels_.rows); }
  const float* at(int64_t tile) const { return words_.get() + tile * tile_words_; }
  void fill(int64_t tile, const float* rows, int64_t stride) {
    kernels_.pack(rows, stride, rows_in(tile), features_, dtype_, words_.get() + tile * tile_words_);
  }

 private:
  const Kernels& kernels_;
  const int64_t rows_, features_;
  const DType dtype_;
  const int64_t tile_words_;
  const std::unique_ptr<float[]> words_;
};

// Calls finish(panel, row, products [32]) for every row, in order within a panel.
template <class Finish>
void multiply(const Kernels& kernels, const Packed& rows, const Weight& weight, int64_t row_count, int threads,
              const Finish& finish) {
  const int64_t panels = divide_up(weight.out_features, panel_width);
  const int team = useful_threads(row_count * weight.in_features * weight.out_features, multiply_grain, threads);
  parallel_for(panels, team, [&](int64_t panel) {
    alignas(64) float products[most_rows * panel_width];
    const char* data = static_cast<const char*>(weight.panels) + panel * panel_bytes(weight);
    for (int64_t tile = 0; tile < rows.tiles(); ++tile) {
      kernels.multiply(rows.at(tile), data, weight.in_features, weight.dtype, products);
      for (int64_t r = 0; r < rows.rows_in(tile); ++r) {
        finish(panel, tile * kernels.rows + r, products + r * panel_width);
      }
    }
  });
}

void read_row(const Tile& x, int64_t row, int64_t features, float* to) {
  if (x.dtype == DType::f32) {
    std::memcpy(to, static_cast<const float*>(x.data) + row * x.stride, features * sizeof(float));
    return;
  }
  for (int64_t c = 0; c < features; ++c) to[c] = load_scalar(x.data, x.dtype, row * x.stride + c);
}

}  // namespace

void attend(const Tile& x, const Weight& scores, const Weight& values, int64_t heads, float eps, float* normalized,
            double* y_sums, int threads) {
  if (x.rows == 0) return;
  const Kernels& kernels = active_kernels();
  const int64_t features = scores.in_features, width = scores.out_features;
  const int team = useful_threads(x.rows * features, element_grain, threads);
  const std::unique_ptr<float[]> y(new float[x.rows * features]);
  const std::unique_ptr<float[]> weights(new float[x.rows * width]);
  const std::unique_ptr<bool[]> finite(new bool[x.rows]);
  {
    Packed packed(kernels, x.rows, features, scores.dtype);
    parallel_for(packed.tiles(), team, [&](int64_t tile) {
      const int64_t first = tile * kernels.rows;
      for (int64_t row = first; row < first + packed.rows_in(tile); ++row) {
        read_row(x, row, features, y.get() + row * features);
        finite[row] = kernels.normalize(y.get() + row * features, features, eps, normalized + row * features);
      }
      packed.fill(tile, normalized + first * features, features);
    });
    multiply(kernels, packed, scores, x.rows, threads, [&](int64_t panel, int64_t row, const float* products) {
      const int64_t column = panel * panel_width, columns = std::min(panel_width, width - column);
      float* to = weights.get() + row * width + column;
      for (int64_t i = 0; i < columns; ++i) to[i] = products[i] + scores.bias[column + i];
    });
  }
  Packed packed(kernels, x.rows, width, values.dtype);
  parallel_for(packed.tiles(), team, [&](int64_t tile) {
    const int64_t first = tile * kernels.rows;
    for (int64_t row = first; row < first + packed.rows_in(tile); ++row) {
      for (int64_t head = 0; head < heads; ++head) {
        kernels.softmax(weights.get() + row * width + head * (width / heads), width / heads);
      }
    }
    packed.fill(tile, weights.get() + first * width, width);
  });
  multiply(kernels, packed, values, x.rows, threads, [&](int64_t panel, int64_t row, const float* products) {
    const int64_t column = panel * panel_width, columns = std::min(panel_width, features - column);
    float* to = y.get() + row * features + column;
    for (int64_t i = 0; i < columns; ++i) to[i] += products[i];
  });
  parallel_for(x.rows, team, [&](int64_t row) {
    kernels.normalize(y.get() + row * features, features, eps, normalized + row * features);
  });
  constexpr int64_t range = 256;
  parallel_for(divide_up(features, range), team, [&](int64_t task) {
    const int64_t first = task * range, columns = std::min(range, features - first);
    Walk walk(x);
    for (int64_t row = 0; row < x.rows; ++row) {
      double* sums = y_sums + walk.next() * features + first;
      if (finite[row]) {
        kernels.add_row(y.get() + row * features + first, columns, sums);
      } else {
        std::fill_n(sums, columns, std::numeric_limits<double>::quiet_NaN());
      }
    }
  });
}

void feed_forward(const Tile& rows, const Weight& hidden, double* gated_sums, int threads) {
  if (rows.rows == 0) return;
  const Kernels& kernels = active_kernels();
  const float* table = qmatmul::gate_table(qmatmul::Epilogue::gelu);
  const int64_t features = hidden.in_features, width = hidden.out_features / 2;
  const float* data = static_cast<const float*>(rows.data);
  Packed packed(kernels, rows.rows, features, hidden.dtype);
  parallel_for(packed.tiles(), useful_threads(rows.rows * features, element_grain, threads),
               [&](int64_t tile) { packed.fill(tile, data + tile * kernels.rows * rows.stride, rows.stride); });
  const std::unique_ptr<int64_t[]> sequence_of(new int64_t[rows.rows]);
  Walk walk(rows);
  for (int64_t row = 0; row < rows.rows; ++row) sequence_of[row] = walk.next();
  multiply(kernels, packed, hidden, rows.rows, threads, [&](int64_t panel, int64_t row, const float* products) {
    const int64_t column = panel * half_panel;
    kernels.add_gated(products, products + half_panel, hidden.bias + column, hidden.bias + width + column,
                      std::min(half_panel, width - column), table, gated_sums + sequence_of[row] * width + column);
  });
}

void gate(const Tile& values, const void* gates, int64_t columns, double* gated_sums, int64_t sums_stride,
          int threads) {
  if (values.rows == 0) return;
  const Kernels& kernels = active_kernels();
  const float* table = qmatmul::gate_table(qmatmul::Epilogue::gelu);
  constexpr int64_t range = 256;
  const float zeros[range] = {};
  const int team = useful_threads(values.rows * columns, element_grain, threads);
  parallel_for(divide_up(columns, range), team, [&](int64_t task) {
    const int64_t first = task * range;
    Walk walk(values);
    for (int64_t row = 0; row < values.rows; ++row) {
      const int64_t index = row * values.stride + first;
      kernels.add_gated(static_cast<const float*>(values.data) + index, static_cast<const float*>(gates) + index, zeros,
                        zeros, std::min(range, columns - first), table, gated_sums + walk.next() * sums_stride + first);
    }
  });
}

void to_panels(const float* weight, int64_t out_features, int64_t in_features, bool gated, DType dtype, void* panels,
               int threads) {
  const int64_t half = out_features / 2;
  const auto source_row = [&](int64_t panel, int64_t i) -> int64_t {
    if (!gated) return panel * panel_width + i < out_features ? panel * panel_width + i : -1;
    const int64_t row = panel * half_panel + i % half_panel;
    return row >= half ? -1 : i < half_panel ? row : half + row;
  };
  const int64_t count = gated ? divide_up(half, half_panel) : divide_up(out_features, panel_width);
  parallel_for(count, threads, [&](int64_t panel) {
    for (int64_t i = 0; i < panel_width; ++i) {
      const int64_t row = source_row(panel, i);
      const auto value = [&](int64_t k) { return row < 0 || k >= in_features ? 0.f : weight[row * in_features + k]; };
      if (dtype == DType::f32) {
        float* to = static_cast<float*>(panels) + panel * in_features * panel_width + i;
        for (int64_t k = 0; k < in_features; ++k) to[k * panel_width] = value(k);
      } else {
        const int64_t pairs = divide_up(in_features, 2);
        uint32_t* to = static_cast<uint32_t*>(panels) + panel * pairs * panel_width + i;
        for (int64_t k = 0; k < pairs; ++k) {
          to[k * panel_width] = float_to_bf16(value(2 * k)) | uint32_t{float_to_bf16(value(2 * k + 1))} << 16;
        }
      }
    }
  });
}

}  // namespace fastembed::latent
