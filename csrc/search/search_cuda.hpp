// Exact search over binary and few-bit codes on a CUDA device. Pointers are device pointers; nothing here waits for the
// device or allocates.
#pragma once

#include <cstdint>

namespace fastembed::search::cuda {

// Rows of codes: `bits` planes of plane_bytes bytes each, one after another; `stride` bytes from row to row.
struct Codes {
  const uint8_t* data;
  int64_t rows;
  int64_t stride;
  const float* inverse_norms;  // null for Hamming distances
};

// What may be found.
struct Filter {
  const uint8_t* mask;       // [codes.rows], zero for codes that may not; null where all may
  const int64_t* ranges;     // [queries.rows, ranges_per_query, 2], first row and the one past the last
  int64_t ranges_per_query;  // negative where all may
};

// How codes are compared.
struct Metric {
  int bits;  // planes, 1 to 4; inverse norms make scores of products of levels
  int64_t plane_bytes;
  int64_t dim;
  bool on_bit_products;  // one-bit tensor-core products, native on sm_80 to sm_90; else those of bytes
};

// How a search is cut: into slices of the codes, each of which gives its k best. A matter of sizes alone.
int64_t slices(int64_t queries, int64_t codes, int64_t k);

// Bytes of device memory that find_candidates needs to work in.
int64_t workspace_bytes(int64_t queries, int64_t codes, int64_t k);

// keys and ids [queries, slices, k]: the k smallest keys of each slice, equal ones of the smallest ids, in the order of
// the ids; keys of 2^31 - 1 and ids of -1 fill up. A key is a Hamming distance, or as a score's bits, ordered so that
// the best score is the smallest key (see search.cu). On `stream` (a cudaStream_t). Throws std::runtime_error when a
// launch fails, or for more than 2^31 - 1 codes.
void find_candidates(const Codes& queries, const Codes& codes, const Metric& metric, const Filter& filter, int64_t k,
                     int32_t* keys, int32_t* ids, void* workspace, void* stream);

}  // namespace fastembed::search::cuda
