// Linear layers on packed low-bit weights. The layout and the arithmetic are defined, in plain PyTorch, by
// fastembed/reference/qmatmul.py.
#pragma once

#include <cstdint>

#include "common/dtype.hpp"
#include "qmatmul/kernels.hpp"

namespace fastembed::qmatmul {

struct Layer {
  const uint8_t* codes;  // [panels, quads, 32 * bits]
  Steps steps;           // [panels, groups, 64]
  int bits;
  int64_t group_size;  // a multiple of 16
  const void* bias;    // [out_features], or null
  DType bias_dtype;
  int64_t in_features;
  int64_t out_features;
  Epilogue epilogue;
  Activations activations;
};

// Rows of in_features elements, each `stride` elements after the one before.
struct Input {
  const void* data;
  DType dtype;
  int64_t rows;
  int64_t stride;
};

// A layer and where its outputs go: y [rows, out_features], contiguous, in the dtype of x; so is the residual, which
// may be null.
struct Projection {
  const Layer* layer;
  const void* residual;
  void* y;
};

// All projections of one input, which is quantised once (and widened once, for layers that compute in floats). Their
// layers have the same in_features.
void qlinear(const Input& x, const Projection* projections, int64_t count, int threads);

}  // namespace fastembed::qmatmul
