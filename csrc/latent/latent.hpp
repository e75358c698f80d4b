// Latent-attention pooling, folded for inference. The arithmetic is defined, in plain PyTorch, by
// fastembed/reference/latent.py; `attend` and `feed_forward` are its two halves over a tile of tokens, with sums over
// the tokens of each sequence instead of means.
#pragma once

#include <cstdint>

#include "common/dtype.hpp"
#include "latent/kernels.hpp"

namespace fastembed::latent {

struct Weight {
  const void* panels;  // as kernels.hpp says
  DType dtype;         // float32 or bfloat16: of the panels, and of what they are multiplied by
  const float* bias;   // [out_features], or null
  int64_t in_features;
  int64_t out_features;
};

// Tokens [first, first + rows) of all tokens packed one sequence after the other, `stride` elements apart.
struct Tile {
  const void* data;
  DType dtype;
  int64_t stride;
  int64_t first;
  int64_t rows;
  const int64_t* offsets;  // [sequences + 1], where each sequence begins
};

// normalized [rows, features]: LN(y) without affine, y = x + softmax(LN(x) scores) values per head.
// y_sums [sequences, features] += y, in the order of the tokens; NaN for a sequence with a token that is not finite.
void attend(const Tile& x, const Weight& scores, const Weight& values, int64_t heads, float eps, float* normalized,
            double* y_sums, int threads);

// gated_sums [sequences, hidden] += a * gelu(gate) of the tile's rows, `rows` in float32, where (a, gate) are the first
// and the second half of the weight's out_features. A panel of the weight holds 16 of a, then their 16 gates.
void feed_forward(const Tile& rows, const Weight& hidden, double* gated_sums, int threads);

// The same from values and gates [rows, columns], each `stride` elements apart, that something else has multiplied.
// gated_sums [sequences, sums_stride].
void gate(const Tile& values, const void* gates, int64_t columns, double* gated_sums, int64_t sums_stride, int threads);

// [out_features, in_features], contiguous, to panels. `gated`: rows are interleaved for feed_forward.
void to_panels(const float* weight, int64_t out_features, int64_t in_features, bool gated, DType dtype, void* panels,
               int threads);

}  // namespace fastembed::latent
