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

// One requested prefix of an exit, or its gradient: [batch, dim], contiguous.
struct Prefix {
  int64_t dim;
  void* data;
};

// Where the sums of one pass over the tokens go, none of them divided; null where not wanted.
struct Several {
  float* sum;
  float* weighted_sum;
  float* max;
};

// What prefixes are written as. The first three are DType's.
enum class OutputType : int { f32 = 0, bf16, f16, i8, bits };

// Tables are indexed by DType, `write` by OutputType.
struct Kernels {
  // Columns [first, first + columns) of the pooled vector of one sequence, which has at least one token. `next` are the
  // tokens that this thread will probably be asked for next, of the same stride; there may be none.
  using Reduce = void (*)(const Tokens& tokens, const Tokens& next, int64_t first, int64_t columns, float divisor,
                          float* pooled);
  Reduce sum[3];           // sum of the tokens, divided
  Reduce weighted_sum[3];  // weights 1, 2, 3, ... by distance from the first token, divided
  Reduce max[3];           // largest per column, NaN if any is NaN; not divided

  // All that is wanted of the three from one reading of the tokens, with the very bits of each, undivided.
  using ReduceSeveral = void (*)(const Tokens& tokens, const Tokens& next, int64_t first, int64_t columns,
                                 const Several& wanted);
  ReduceSeveral several[3];

  // The largest per column as above, and which token it is of (its index): the first, if several are as large.
  using MaxAndWinner = void (*)(const Tokens& tokens, int64_t first, int64_t columns, float* pooled, int32_t* winner);
  MaxAndWinner max_and_winner[3];

  // Row `row` of every prefix of one pooled vector, divided by its own norm when asked. `prefixes` rise in dim.
  using Write = void (*)(const float* pooled, const Prefix* prefixes, int64_t count, int64_t row, bool normalize);
  Write write[5];

  // The way back through `write` and the division by `divisor`: the gradient of the first `columns` sums from those of
  // the prefixes.
  using PrefixesBackward = void (*)(const float* pooled, const Prefix* grads, int64_t count, int64_t row,
                                    bool normalize, float divisor, int64_t columns, float* grad);
  PrefixesBackward prefixes_backward[3];

  // The gradient of one token: weight * grad in the first `columns` of `size` columns, zeros in the others. With
  // `stream` past the caches, which needs settle() before anyone reads or writes there.
  using TokenBackward = void (*)(const float* grad, float weight, int64_t columns, int64_t size, bool stream,
                                 void* token);
  TokenBackward token_backward[3];
  void (*settle)();
};

// Most columns that one call to a Reduce may ask for: what it keeps on the stack stays in the second-level cache.
constexpr int64_t max_columns = 4096;

}  // namespace fastembed::pooling
