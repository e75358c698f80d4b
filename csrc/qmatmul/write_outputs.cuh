// What becomes of the sums over a token's groups: the token's scale, bias, activation function, residual.
#pragma once

#include <cstdint>

#include "common/device_dtype.cuh"
#include "qmatmul/qmatmul.hpp"
#include "qmatmul/warp_tile.cuh"

namespace fastembed::qmatmul::cuda {

struct Outputs {
  void* data;
  const void* residual;
  const void* bias;
  const float* token_scales;
  DType dtype;
  DType bias_dtype;
  Epilogue epilogue;
  bool vectorised;
  int64_t rows;
  int64_t columns;
};

__device__ inline float apply_epilogue(float y, Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::none:
      return y;
    case Epilogue::gelu:
      return 0.5f * y * (1.0f + erff(y * 0.70710678f));
    case Epilogue::gelu_tanh:
      return 0.5f * y * (1.0f + tanhf(0.79788456f * (y + 0.044715f * y * y * y)));
    case Epilogue::relu:
      return y < 0.0f ? 0.0f : y;  // a NaN stays
    case Epilogue::silu:
      return y / (1.0f + expf(-y));
  }
  return y;
}

__device__ inline void load_outputs(const void* data, DType dtype, int64_t index, int count, bool vectorised,
                                    float (&values)[lane_features]) {
  if (vectorised) {
    device::load_eight(data, dtype, index, values);
  } else {
#pragma unroll
    for (int i = 0; i < lane_features; ++i) values[i] = i < count ? device::load(data, dtype, index + i) : 0.0f;
  }
}

// Eight output features of a token, from the sums over its groups.
__device__ inline void write_outputs(const Outputs& to, int64_t token, int64_t feature,
                                     const float (&totals)[lane_features]) {
  if (token >= to.rows || feature >= to.columns) return;
  const int64_t index = token * to.columns + feature;
  const int count = static_cast<int>(min(to.columns - feature, int64_t{lane_features}));
  float bias[lane_features] = {};
  float residual[lane_features] = {};
  if (to.bias != nullptr) load_outputs(to.bias, to.bias_dtype, feature, count, to.vectorised, bias);
  if (to.residual != nullptr) load_outputs(to.residual, to.dtype, index, count, to.vectorised, residual);
  const float scale = to.token_scales[token];
  float y[lane_features];
#pragma unroll
  for (int i = 0; i < lane_features; ++i) {
    y[i] = apply_epilogue(totals[i] * scale + bias[i], to.epilogue) + residual[i];
  }
  if (to.vectorised) {
    device::store_eight(to.data, to.dtype, index, y);
  } else {
#pragma unroll
    for (int i = 0; i < lane_features; ++i) {
      if (i < count) device::store(to.data, to.dtype, index + i, y[i]);
    }
  }
}

}  // namespace fastembed::qmatmul::cuda
