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

// softmax(scale * query key^T + bias) value over the kept keys, added up over `heads_each` neighbouring heads.
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
  const float* bias;   // [heads, keys]; null for none
  int64_t heads_each;  // more than one only with at most forward_columns() keys, all of them kept
};

// The most keys (queries, for the gradients of keys and values) whose sums are made in one go: then results are written
// in the dtype of the attention, otherwise in float32. Forward 512, or 256 on the device that is current if its blocks
// have too little shared memory for more (compute capability 8.6, 8.9, 12).
int forward_columns();
constexpr int backward_columns = 128;
// Queries that a block has, in 16 bits and in float32.
constexpr int rows_16_bit = 64;
constexpr int rows_float32 = 32;

// out: [batch, heads, queries, value_features]; lse: float32 [batch, heads, queries], the logarithm of the softmax's
// sum, infinity without a key. Both contiguous, out zero before where a row may have no key. Throws std::runtime_error
// when a launch fails, here and below.
void attend(const Attention& attention, void* out, float* lse, void* stream);

// out: float32 [batch, heads / heads_each, queries, value_features], contiguous.
void attend_folded(const Attention& attention, float* out, void* stream);

// Gradients, contiguous and zero before: of query, where there are no other results than those of kept keys, and of key
// and value. grad: that of out; deltas: float32 [batch, heads, queries], the sums of grad * out.
void attend_backward(const Attention& attention, const Matrices& grad, const float* lse, const float* deltas,
                     void* query_grad, void* key_grad, void* value_grad, void* stream);

// Hidden features of the tokens of all sequences, one after the other: [tokens, features], neighbours along the
// features.
struct Gated {
  DType dtype;  // f32 or bf16
  const void* values;
  const void* gates;
  int64_t stride;  // of both, from token to token
  const float* value_bias;
  const float* gate_bias;
  int64_t tokens;
  int64_t features;
  const int64_t* offsets;  // [sequences + 1], clamped to the tokens
  int64_t sequences;
  float* means;
  int64_t means_stride;
};

// means[sequence, feature] = the mean over a sequence of (values + value_bias) * gelu(gates + gate_bias); zero without
// a token.
void gated_means(const Gated& gated, void* stream);

}  // namespace fastembed::latent::cuda
