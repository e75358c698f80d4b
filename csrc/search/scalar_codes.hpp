// Scalar codes: vectors as one small unsigned integer per dimension and four numbers per vector. A vector of codes c
// stands for lower + step * c. What quantiser chose lower and step does not matter to the search.
#pragma once

#include <cstdint>

#include "common/dtype.hpp"
#include "search/search.hpp"

namespace fastembed::search {

enum class ScalarMethod : int { rabitq = 0, osq = 1, sign = 2 };
enum class ScalarMetric : int { inner_product = 0, cosine = 1, l2 = 2 };

// Floats beside a code: lower, step, the sum of its integers, and what is added to its inner products.
constexpr int64_t scalar_factors = 4;
// Sign vectors of the random rotation.
constexpr int64_t rotation_rounds = 4;

struct ScalarEncoder {
  ScalarMethod method;
  ScalarMetric metric;
  int bits;  // 1 to 8; osq up to 15; sign 1
  int64_t dim;
  const float* centroid;  // [dim], subtracted from the vectors; or null
  const uint8_t* signs;   // [rotation_rounds, dim] of 0 and 1, of the rotation; or null
};

// x [rows, dim], contiguous. codes [rows, bits * ceil(dim / 8)]: bit planes, most significant first, each as pack_bits
// packs them; factors [rows, scalar_factors]. Returns the first row with a value that is not finite, or -1.
int64_t scalar_encode(const ScalarEncoder& encoder, const void* x, DType dtype, int64_t rows, uint8_t* codes,
                      float* factors, int threads);

struct ScalarMatrix {
  Matrix codes;
  const float* factors;  // [rows, scalar_factors]
  int bits;
};

// The k codes of largest estimated inner product with each query, ordered by (-score, id); behind the last code
// selected stand score -infinity and id -1. Queries of 1 to 15 bits, codes of 1 to 8; 128 * dim * (2^bits - 1) < 2^31.
// `scalar_codes.inl` has the score.
void scalar_topk(const ScalarMatrix& queries, const ScalarMatrix& codes, const Selection& selection, int64_t dim,
                 int64_t k, float* scores, int64_t* ids, int threads);

}  // namespace fastembed::search
