// What the instruction-set levels implement. Plain types only: this header is compiled under every level's flags.
#pragma once

#include <cstdint>

#include "common/dtype.hpp"

namespace fastembed::latent {

// Output features of a weight are packed, and worked on, by the panel: [panels, in_features, 32] in float32 and
// [panels, ceil(in_features / 2), 32, 2] in bfloat16, so that neighbouring pairs of products share an instruction.
constexpr int64_t panel_width = 32;
constexpr int64_t half_panel = panel_width / 2;

// Products are summed in float32 over this many input features and the sums added up: the rounding error of one long
// chain would be several times that of a good matrix product.
constexpr int64_t chain = 256;

struct Kernels {
  // Rows that `multiply` takes at once; fewer are padded with zeros. No row's result depends on the others.
  int64_t rows;

  // LayerNorm without its affine part: (row - mean) / sqrt(variance + eps). False, and zeros, where an element is NaN
  // or infinite.
  bool (*normalize)(const float* row, int64_t features, float eps, float* normalized);
  void (*softmax)(float* row, int64_t count);

  // `count` rows of float32, `stride` apart, into the order and the dtype (float32 or bfloat16) that `multiply` reads.
  void (*pack)(const float* rows, int64_t stride, int64_t count, int64_t features, DType dtype, void* packed);
  // products [rows, 32] = packed rows times one panel, over all its input features.
  void (*multiply)(const void* packed, const void* panel, int64_t features, DType dtype, float* products);

  // sums[i] += a_i gelu(gate_i) for i < count, with a = value + bias and gate likewise. gelu is max(x, 0) minus the
  // polynomials of `table` (qmatmul::gate_table).
  void (*add_gated)(const float* values, const float* gates, const float* value_bias, const float* gate_bias,
                    int64_t count, const float* table, double* sums);
  void (*add_row)(const float* row, int64_t count, double* sums);
};

}  // namespace fastembed::latent
