// Compares the AVX-VNNI kernels of qmatmul with the AVX2 ones, bit by bit. test_avxvnni.py builds and runs it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "qmatmul/kernels.hpp"

namespace fastembed::qmatmul {
extern const Kernels avx2_kernels;
extern const Kernels avxvnni_kernels;
}  // namespace fastembed::qmatmul

using namespace fastembed;
using namespace fastembed::qmatmul;

namespace {

struct Shape {
  int64_t in_features;
  int64_t group_size;
  int64_t columns;
  int64_t rows;
};

template <class T>
struct Aligned {
  explicit Aligned(int64_t count) : data(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) / 64 + 1) * 64))) {
    std::memset(data, 0, (count * sizeof(T) / 64 + 1) * 64);
  }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  ~Aligned() { std::free(data); }
  T* data;
};

// What one level makes of a layer, from the activations on.
std::vector<float> run(const Kernels& kernels, const Panel& panel, const Shape& shape, const std::vector<float>& x) {
  const int64_t stride = (shape.in_features / 64 + 1) * 64;
  Aligned<int8_t> codes(shape.rows * stride);
  std::vector<float> scales(shape.rows);
  std::vector<int32_t> sums(shape.rows * panel.groups);
  for (int64_t row = 0; row < shape.rows; ++row) {
    int8_t* to = codes.data + row * stride;
    kernels.quantize(x.data() + row * shape.in_features, DType::f32, shape.in_features, to, stride, &scales[row]);
    kernels.sum_groups(to, shape.in_features, shape.group_size, sums.data() + row * panel.groups);
  }
  alignas(64) float bias[panel_width];
  for (int64_t i = 0; i < panel_width; ++i) bias[i] = static_cast<float>(i);
  std::vector<float> y(shape.rows * shape.columns);
  Aligned<char> scratch(kernels.scratch_bytes(panel, shape.rows));
  kernels.multiply(panel, {codes.data, stride, scales.data(), sums.data(), shape.rows},
                   {y.data(), DType::f32, shape.columns, shape.columns, bias, nullptr, Epilogue::none, nullptr},
                   scratch.data);
  return y;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  int failures = 0, runs = 0;
  const Shape shapes[] = {{200, 64, 64, 1}, {200, 16, 64, 21}, {5, 16, 3, 4}, {1027, 128, 40, 7}, {4096, 4096, 64, 2}};
  for (const Shape& shape : shapes) {
    for (int bits = 1; bits <= 8; ++bits) {
      for (const Zeros kind : {Zeros::midpoint, Zeros::codes, Zeros::fractional}) {
        for (const bool extreme : {false, true}) {
          const int64_t quads = (shape.in_features + 3) / 4;
          const int64_t groups = (shape.in_features + shape.group_size - 1) / shape.group_size;
          std::vector<uint8_t> codes(quads * 32 * bits), code_zeros(groups * panel_width);
          std::vector<float> scales(groups * panel_width), zeros(groups * panel_width);
          std::vector<float> x(shape.rows * shape.in_features);
          for (uint8_t& byte : codes) byte = extreme ? 255 : static_cast<uint8_t>(random());
          for (uint8_t& zero : code_zeros) zero = extreme ? 0 : static_cast<uint8_t>(random() & ((1 << bits) - 1));
          for (float& scale : scales) scale = static_cast<float>(random() % 1000) * 1e-3f;
          for (float& zero : zeros) zero = static_cast<float>(random() % 2550) * 0.1f;
          for (float& value : x) value = extreme ? -1.f : static_cast<float>(random() % 2001) - 1000.f;
          const void* of_kind = kind == Zeros::codes        ? static_cast<const void*>(code_zeros.data())
                                : kind == Zeros::fractional ? zeros.data()
                                                            : nullptr;
          const Panel panel{
              codes.data(), {scales.data(), DType::f32, of_kind, kind}, bits, shape.group_size / 4, quads, groups,
              nullptr};
          const std::vector<float> expected = run(avx2_kernels, panel, shape, x);
          const std::vector<float> found = run(avxvnni_kernels, panel, shape, x);
          ++runs;
          if (std::memcmp(expected.data(), found.data(), expected.size() * sizeof(float)) == 0) continue;
          std::printf("%d bits, zeros %d, %d x %d differ\n", bits, static_cast<int>(kind), static_cast<int>(shape.rows),
                      static_cast<int>(shape.in_features));
          ++failures;
        }
      }
    }
  }
  std::printf("%d layers, %d differ\n", runs, failures);
  return failures > 0;
}
