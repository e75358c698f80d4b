// Fixed dimensional encodings of sets of token embeddings (MUVERA). Defined, in plain PyTorch, by
// fastembed/reference/fde.py.
#pragma once

#include <cstdint>

namespace fastembed::search {

// The random matrices that make an encoding.
struct FDEMatrices {
  const float* hyperplanes;  // [dim, repetitions * bits]
  const float* projections;  // [repetitions, dim, projected], or null: blocks are not projected, projected == dim
  int64_t dim;
  int64_t repetitions;
  int bits;
  int64_t projected;
  // Of the encoding, [repetitions * 2^bits * projected]: the component of the result that an element is added to, and
  // with which sign. Null: the encoding is the result.
  const int64_t* buckets;
  const float* signs;
  int64_t final_dim;  // of the result

  int64_t blocks() const { return repetitions << bits; }
};

// out [sequences, final_dim], from the tokens [offsets[i], offsets[i + 1]) of sequence i. `documents`: blocks are
// means, and an empty block takes the token that differs from it in the fewest bits. Returns the first token that is
// not finite, in which case `out` is not to be used, or -1.
int64_t fde(const float* tokens, const int64_t* offsets, int64_t sequences, const FDEMatrices& matrices, bool documents,
            float* out, int threads);

}  // namespace fastembed::search
