// Multi-exit pooling on the CPU: several hidden states to several normalised prefixes of their pooled vectors.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.hpp"
#include "pooling/kernels.hpp"

namespace fastembed::pooling {

// As fastembed/ops/pooling.py orders MODES.
enum class Mode : int { mean = 0, cls, lasttoken, max, mean_sqrt_len, weightedmean };

// A mask of any dtype, read as bits: `one` is a valid token, zero and `negative_zero` are padding. Strides in elements.
struct Mask {
  const void* data;
  int64_t sequence_stride;
  int64_t token_stride;
  int64_t element_size;
  uint64_t one;
  uint64_t negative_zero;
};

// Offsets of packed sequences, int32 or int64.
struct Offsets {
  const void* data;
  int64_t stride;
  bool is_int64;
};

// Padded: `sequences` of `tokens` each, all valid without a mask. Packed: `tokens` in all, cut by the offsets.
struct Batch {
  int64_t sequences;
  int64_t tokens;
  const Mask* mask;        // null: none
  const Offsets* offsets;  // null: padded
};

// One hidden state, feature axis contiguous, strides in elements (sequence_stride is 0 when packed), and what is wanted
// of it.
struct Exit {
  const void* data;
  int64_t sequence_stride;
  int64_t token_stride;
  std::vector<Prefix> prefixes;
};

// Fills every prefix. Throws as TokenPlan does, before anything is read or written.
void pool_exits(std::vector<Exit> exits, const Batch& batch, Mode mode, DType dtype, DType out_dtype, bool normalize,
                int threads);

}  // namespace fastembed::pooling
