// Attention between tokens and latents, on a CUDA device. Pointers are device pointers; nothing here waits for the
// device or allocates.
#pragma once

#include <cstdint>

#include "common/dtype.hpp"

namespace fastembed::latent::cuda {

// [batch, heads, rows, features], neighbours along the features; strides in elements. Rows must be aligned to 16 bytes.
struct Matrices {
  const void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t stride;
};

// Which keys of a batch count, nonzero those that do; null for all.
struct Keep {
  const uint8_t* data;
  int64_t batch_stride;
  int64_t stride;
};

// softmax(scale * query key^T) value over the kept keys, in bf16 or f16.
struct Attention {
  DType dtype;
  int64_t batch;
  int64_t heads;
  int64_t queries;
  int64_t keys;
  int64_t features;
  int64_t value_features;
  Matrices query;
  Matrices key;
  Matrices value;
  Keep keep;
  float scale;
};

// The most keys (queries, for the gradients of keys and values) whose sums are made in one go: then results are written
// in the dtype of the attention, otherwise in float32.
constexpr int forward_columns = 256;
constexpr int backward_columns = 128;

// out: [batch, heads, queries, value_features]; lse: float32 [batch, heads, queries], the logarithm of the softmax's
// sum, infinity without a key. Both contiguous. Throws std::runtime_error when a launch fails, here and below.
void attend(const Attention& attention, void* out, float* lse, void* stream);

// Gradients, contiguous and zero before: of query, where there are no other results than those of kept keys, and of key
// and value. grad: that of out; deltas: float32 [batch, heads, queries], the sums of grad * out.
void attend_backward(const Attention& attention, const Matrices& grad, const float* lse, const float* deltas,
                     void* query_grad, void* key_grad, void* value_grad, void* stream);

}  // namespace fastembed::latent::cuda
