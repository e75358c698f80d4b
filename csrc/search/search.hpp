// Exact search over binary and few-bit codes, and the encoders that make them. All matrices are row-major; `stride` is
// the bytes from one row to the next. `threads` 0 asks OpenMP. Results do not depend on it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "common/dtype.hpp"

namespace fastembed::search {

struct Matrix {
  const uint8_t* data;
  int64_t rows;   // less than 2^32
  int64_t bytes;  // of a row
  int64_t stride;
};

// The codes that a search looks at: the rows that pass every filter there is. A count of -1: no such filter.
struct Selection {
  const int64_t* ids;  // ascending row numbers
  int64_t id_count;
  const int64_t*
      ranges;  // [queries, range_count, 2]: first row and the one past the last; those of a query may overlap
  int64_t range_count;

  bool has_ids() const { return id_count >= 0; }
  bool has_ranges() const { return range_count >= 0; }
};

// bit = x > threshold, most significant bit first; x is contiguous, codes [rows, ceil(dim / 8)]. Without thresholds
// they are 0.
void pack_bits(const void* x, DType dtype, int64_t rows, int64_t dim, const float* thresholds, uint8_t* codes,
               int threads);

// The k codes of smallest Hamming distance to each query, ordered by (distance, id). Behind the last code selected
// stand distance INT32_MAX and id -1.
void hamming_topk(const Matrix& queries, const Matrix& codes, const Selection& selection, int64_t k, int32_t* distances,
                  int64_t* ids, int threads);

// What a range search found.
struct RangeResult {
  std::vector<int64_t> lims;                       // [queries + 1]: results lims[q] up to lims[q + 1] are query q's
  std::vector<std::unique_ptr<uint64_t[]>> found;  // of each query: distance << 32 | id

  RangeResult() = default;
  RangeResult(RangeResult&&) = default;

  // distances and ids: [lims.back()].
  void write(int32_t* distances, int64_t* ids) const;
};

// The codes within `radius` of each query, ordered by (distance, id).
RangeResult hamming_range(const Matrix& queries, const Matrix& codes, const Selection& selection, int64_t radius,
                          int threads);

// Codes of `bits` bit planes, 1 to 8, most significant first, each ceil(dim / 8) bytes packed as by pack_bits, and
// 1 / norm of each vector of levels. Returns the first row with a value that is not finite, or -1.
int64_t sdc_encode(const float* x, int64_t rows, int64_t dim, int bits, uint8_t* codes, float* inverse_norms,
                   int threads);

struct SdcMatrix {
  Matrix codes;
  const float* inverse_norms;
};

// The k codes of largest cosine to each query, ordered by (-score, id). Behind the last code selected stand score
// -infinity and id -1. dim * (2^bits - 1)^2 < 2^31.
void sdc_topk(const SdcMatrix& queries, const SdcMatrix& codes, const Selection& selection, int64_t dim, int bits,
              int64_t k, float* scores, int64_t* ids, int threads);

// Codes in lists one after another, of which a search looks into `probes` for each query.
struct InvertedLists {
  const int64_t* starts;  // first code of each list, then the number of codes
  const int64_t* ids;     // of the codes, ascending within each list
  int64_t probes;
};

// The `count` lists nearest to each query by Hamming distance of their binary centroids to its first plane.
void nearest_lists(const Matrix& queries, const Matrix& centroids, int64_t count, int64_t* lists, int threads);

// As hamming_topk and sdc_topk of the codes of the lists `probed` [queries, probes], but ordered by (value, id). Gives
// row numbers of `codes`.
void hamming_lists_topk(const Matrix& queries, const Matrix& codes, const InvertedLists& lists, const int64_t* probed,
                        int64_t k, int32_t* distances, int64_t* rows, int threads);
void sdc_lists_topk(const SdcMatrix& queries, const SdcMatrix& codes, const InvertedLists& lists, const int64_t* probed,
                    int64_t dim, int bits, int64_t k, float* scores, int64_t* rows, int threads);

// For each query the k of its `count` candidate documents with the largest dot product, ordered by (-score, id).
// Contiguous: queries [rows, dim], candidates [rows, count], each in [0, documents).
void rescore(const float* queries, int64_t rows, const float* documents, int64_t dim, const int64_t* candidates,
             int64_t count, int64_t k, float* scores, int64_t* ids, int threads);

}  // namespace fastembed::search
