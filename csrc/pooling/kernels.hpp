// What the instruction-set levels implement. Plain types only: this header is compiled under every level's flags.
#pragma once

#include <cstdint>

namespace fastembed::pooling {

using f32 = float;
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The tokens of one sequence in one exit: token i stands `index[i] * stride` elements after `data`.
struct Tokens {
  const void* data;
  int64_t stride;
  const int64_t* index;
  int64_t count;
};

// One requested prefix of an exit: [batch, dim], contiguous.
struct Prefix {
  int64_t dim;
  void* data;
};

// Tables are indexed by DType.
struct Kernels {
  // Columns [first, first + columns) of the pooled vector of one sequence, which has at least one token.
  using Reduce = void (*)(const Tokens& tokens, int64_t first, int64_t columns, float divisor, float* pooled);
  Reduce sum[3];           // sum of the tokens, divided
  Reduce weighted_sum[3];  // weights 1, 2, 3, ... by distance from the first token, divided
  Reduce max[3];           // largest per column, NaN if any is NaN; not divided

  // Row `row` of every prefix of one pooled vector, each divided by its own norm when asked. `prefixes` rise in dim.
  using Write = void (*)(const float* pooled, const Prefix* prefixes, int64_t count, int64_t row, bool normalize);
  Write write[3];
};

// Most columns that one call to a Reduce may ask for: what it keeps on the stack stays in the first-level cache.
constexpr int64_t max_columns = 1024;

}  // namespace fastembed::pooling
