// Exact search over binary and few-bit codes, and the encoders that make them. All matrices are row-major; `stride` is
// the bytes from one row to the next. `threads` 0 asks OpenMP. Results do not depend on it.
#pragma once

#include <cstdint>

#include "common/dtype.hpp"

namespace fastembed::search {

struct Matrix {
  const uint8_t* data;
  int64_t rows;
  int64_t bytes;  // of a row
  int64_t stride;
};

// bit = x > 0, most significant bit first; x is contiguous, codes [rows, ceil(dim / 8)].
void pack_bits(const void* x, DType dtype, int64_t rows, int64_t dim, uint8_t* codes, int threads);

// The k codes of smallest Hamming distance to each query, ordered by (distance, id). 1 <= k <= codes.rows.
void hamming_topk(const Matrix& queries, const Matrix& codes, int64_t k, int32_t* distances, int64_t* ids, int threads);

// Codes of `bits` bit planes, most significant first, each ceil(dim / 8) bytes packed as by pack_bits, and 1 / norm of
// each vector of levels. Returns the first row with a value that is not finite, or -1.
int64_t sdc_encode(const float* x, int64_t rows, int64_t dim, int bits, uint8_t* codes, float* inverse_norms,
                   int threads);

struct SdcMatrix {
  Matrix codes;
  const float* inverse_norms;
};

// The k codes of largest cosine to each query, ordered by (-score, id). 1 <= k <= codes.rows.
void sdc_topk(const SdcMatrix& queries, const SdcMatrix& codes, int64_t dim, int bits, int64_t k, float* scores,
              int64_t* ids, int threads);

// For each query the k of its `count` candidate documents with the largest dot product, ordered by (-score, id).
// Contiguous: queries [rows, dim], candidates [rows, count], each in [0, documents).
void rescore(const float* queries, int64_t rows, const float* documents, int64_t dim, const int64_t* candidates,
             int64_t count, int64_t k, float* scores, int64_t* ids, int threads);

}  // namespace fastembed::search
