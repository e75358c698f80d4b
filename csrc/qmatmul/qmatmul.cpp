#include "qmatmul/qmatmul.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "common/half.hpp"
#include "common/isa.hpp"
#include "common/threading.hpp"
#include "qmatmul/gate_table.hpp"

namespace fastembed::qmatmul {

extern const Kernels generic_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512vnni_kernels;
constexpr KernelsByIsa<Kernels> kernels{{&generic_kernels, &avx2_kernels, nullptr, &avx512vnni_kernels}};
#else
constexpr KernelsByIsa<Kernels> kernels{{&generic_kernels, nullptr, nullptr, nullptr}};
#endif

namespace {

// Quantised activations of at most this many bytes are in flight, so that they stay in the last-level cache between
// their quantisation and the last panel that reads them.
constexpr int64_t tokens_budget = int64_t{2} << 20;
// Work below which another thread costs more than it brings, in multiply-adds and in elements to quantise.
constexpr int64_t multiply_grain = int64_t{1} << 20;
constexpr int64_t quantize_grain = int64_t{1} << 15;
// A task unpacks its panel once: few rows would not pay for that.
constexpr int64_t rows_per_task = 192;
constexpr int64_t tasks_per_thread = 4;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that a thread keeps from call to call, so that large layers do not pay for fresh pages every time.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  char* at_least(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = divide_up(bytes, 64) * 64;
      data_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(size_)));
      if (data_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0;
};

// Quantised tokens in a thread's buffer.
struct Storage {
  int8_t* codes;
  float* scales;
  int32_t* sums;

  Storage(int64_t rows, int64_t stride, int64_t groups) {
    thread_local Buffer buffer;
    codes = reinterpret_cast<int8_t*>(buffer.at_least(rows * (stride + 4 + 4 * groups)));
    scales = reinterpret_cast<float*>(codes + rows * stride);
    sums = reinterpret_cast<int32_t*>(scales + rows);
  }
};

int useful_threads(int64_t work, int64_t grain, int threads) {
  return team_size(std::max<int64_t>(1, work / grain), threads);
}

const char* element(const void* data, DType dtype, int64_t index) {
  return static_cast<const char*>(data) + index * size_of(dtype);
}

Steps steps_from(const Steps& steps, int64_t index) {
  const DType dtype = steps.dtype;
  const char* zeros = static_cast<const char*>(steps.zeros);
  if (zeros != nullptr) zeros += index * (steps.kind == Zeros::codes ? 1 : size_of(dtype));
  return {element(steps.scales, dtype, index), dtype, zeros, steps.kind};
}

void widen_bias(const Weight& weight, int64_t first, int64_t columns, float* bias) {
  std::memset(bias, 0, panel_width * sizeof(float));
  if (weight.bias == nullptr) return;
  const char* data = element(weight.bias, weight.bias_dtype, first);
  for (int64_t i = 0; i < columns; ++i) bias[i] = load_scalar(data, weight.bias_dtype, i);
}

// One call, seen as tasks: rows to quantise, then panels by row ranges to multiply.
class Layer {
 public:
  Layer(const Weight& weight, DType dtype, Epilogue epilogue, int threads)
      : kernels_(kernels.active()), weight_(weight), dtype_(dtype), epilogue_(epilogue), threads_(threads) {}

  void run(const Input& x, const void* residual, void* y) const {
    // An odd number of cache lines between rows keeps the rows of a tile out of each other's cache sets.
    const int64_t stride = (divide_up(weight_.in_features, 64) | 1) * 64;
    const int64_t block = std::max(rows_per_task, tokens_budget / stride);
    for (int64_t first = 0; first < x.rows; first += block) {
      const int64_t rows = std::min(block, x.rows - first);
      const Storage storage(rows, stride, groups());
      quantize({element(x.data, x.dtype, first * x.stride), x.dtype, rows, x.stride}, storage, stride);
      const Tokens tokens{storage.codes, stride, storage.scales, storage.sums, rows};
      multiply(tokens, Rows{y, residual}.from(first * weight_.out_features, dtype_));
    }
  }

 private:
  // The outputs from some element on, and what is added to them.
  struct Rows {
    void* y;
    const void* residual;

    Rows from(int64_t index, DType dtype) const {
      const int64_t offset = index * size_of(dtype);
      return {static_cast<char*>(y) + offset,
              residual == nullptr ? nullptr : static_cast<const char*>(residual) + offset};
    }
  };

  int64_t groups() const { return divide_up(weight_.in_features, weight_.group_size); }

  void quantize(const Input& x, const Storage& to, int64_t stride) const {
    const int team = useful_threads(x.rows * weight_.in_features, quantize_grain, threads_);
    const int64_t chunk = divide_up(x.rows, team * tasks_per_thread);
    parallel_for(divide_up(x.rows, chunk), team, [&](int64_t task) {
      const int64_t end = std::min(x.rows, (task + 1) * chunk);
      for (int64_t row = task * chunk; row < end; ++row) {
        kernels_.quantize(element(x.data, x.dtype, row * x.stride), x.dtype, weight_.in_features, weight_.group_size,
                          to.codes + row * stride, stride, to.scales + row, to.sums + row * groups());
      }
    });
  }

  void multiply(const Tokens& tokens, const Rows& to) const {
    const int64_t panels = divide_up(weight_.out_features, panel_width);
    const int team = useful_threads(tokens.rows * weight_.in_features * weight_.out_features, multiply_grain, threads_);
    const int64_t wanted = team == 1 ? 1 : divide_up(team * tasks_per_thread, panels);
    const int64_t ranges = std::min(wanted, divide_up(tokens.rows, rows_per_task));
    const int64_t range = divide_up(divide_up(tokens.rows, ranges), 6) * 6;
    parallel_for(panels * ranges, team, [&](int64_t task) {
      const int64_t first = task % ranges * range;
      const int64_t rows = std::min(range, tokens.rows - first);
      if (rows <= 0) return;
      multiply_panel(task / ranges,
                     {tokens.codes + first * tokens.stride, tokens.stride, tokens.scales + first,
                      tokens.sums + first * groups(), rows},
                     to.from(first * weight_.out_features, dtype_));
    });
  }

  void multiply_panel(int64_t index, const Tokens& tokens, const Rows& to) const {
    thread_local Buffer scratch;
    const int64_t quads = divide_up(weight_.in_features, quad);
    const int64_t per_group = index * groups() * panel_width;
    const Panel panel{weight_.codes + index * quads * 32 * weight_.bits,
                      steps_from(weight_.steps, per_group),
                      weight_.bits,
                      weight_.group_size / quad,
                      quads,
                      groups()};
    const int64_t column = index * panel_width;
    const int64_t columns = std::min(panel_width, weight_.out_features - column);
    alignas(64) float bias[panel_width];
    widen_bias(weight_, column, columns, bias);
    const Rows part = to.from(column, dtype_);
    const Output output{part.y,        dtype_,    weight_.out_features, columns, bias,
                        part.residual, epilogue_, gate_table(epilogue_)};
    kernels_.multiply(panel, tokens, output, scratch.at_least(kernels_.scratch_bytes(panel)));
  }

  const Kernels& kernels_;
  const Weight& weight_;
  const DType dtype_;
  const Epilogue epilogue_;
  const int threads_;
};

}  // namespace

void qlinear(const Input& x, const Weight& weight, Epilogue epilogue, const void* residual, void* y, int threads) {
  if (x.rows == 0 || weight.out_features == 0) return;
  Layer(weight, x.dtype, epilogue, threads).run(x, residual, y);
}

}  // namespace fastembed::qmatmul
