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

// Padded: `sequences` of `tokens` each. Packed: `tokens` in all, cut by the offsets; a mask then has one row of them.
struct Batch {
  int64_t sequences;
  int64_t tokens;
  const Mask* mask;        // null: every token is valid
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

// Several modes of which the vectors stand side by side, each as long as an exit has columns.
struct SeveralModes {
  std::vector<Mode> modes;
  std::vector<int64_t> sizes;  // columns of each exit
};

// What the backward needs of an exit, of the columns of its largest prefix, contiguous.
struct State {
  float* pooled;    // [sequences, columns], before normalisation
  int32_t* winner;  // max only: [sequences, columns], the token that each value is of; -1 without tokens. Else null
};

// Fills every prefix, and the states unless there are none. Throws as TokenPlan does, before anything is read or
// written.
void pool_exits(std::vector<Exit> exits, const std::vector<State>& states, const Batch& batch, Mode mode, DType dtype,
                OutputType out_type, bool normalize, int threads);

// As above for several modes. Prefixes are of the vectors side by side. The modes that read every token share one
// reading; each has the very bits that it has by itself.
void pool_modes(std::vector<Exit> exits, const SeveralModes& several, const Batch& batch, DType dtype,
                OutputType out_type, bool normalize, int threads);

// The gradient of an exit's hidden state, [sequences, tokens, size] or packed [tokens, size], contiguous, to be filled
// from the gradients of its prefixes.
struct ExitGradient {
  void* data;
  int64_t size;
  State state;
  std::vector<Prefix> prefixes;
};

// Fills every gradient; `dtype` is theirs, `prefix_dtype` that of the prefixes'. Throws as TokenPlan does.
void pool_exits_backward(std::vector<ExitGradient> exits, const Batch& batch, Mode mode, DType dtype,
                         DType prefix_dtype, bool normalize, int threads);

}  // namespace fastembed::pooling
