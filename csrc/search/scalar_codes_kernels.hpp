// The kernels of scalar codes of one instruction set. Plain data: files of every instruction set include it.
#pragma once

#include <cstdint>

#include "search/kernels.hpp"

namespace fastembed::search {

// What the score takes of a query besides its integers. These are signed: s = c - 2^(bits - 1).
struct ScalarQuery {
  float step, lower;  // the query is lower + step * s
  float sum;          // of s
  float extra;
};

// The same of the codes of a block: the arrays `step`, `lower`, `total` (the sum of what the code stands for) and
// `extra`, one behind the other, `stride` floats apart.
struct BlockFactors {
  float* data;
  int64_t stride;
};

struct ScalarQueryGroup {
  const uint8_t* data;         // [queries, parts, bytes]
  int64_t bytes;               // of a part
  const ScalarQuery* queries;  // of all
  const uint32_t* members;
  int64_t count;  // of members
  Candidates* candidates;
};

// Products by table: for every few bits of a code the table of a query has what they contribute, up to `table_bias`.
// The parts of a query are half bytes, the least significant first, the last one signed.
struct ScalarLookups {
  int64_t codes;                      // side by side
  int64_t index_bits;                 // of a code looked up at once
  int64_t chunk_bytes, chunk_groups;  // bytes of a plane that are packed together, and the indices they give
  // Codes become [rows / codes, planes, groups, codes] indices of a byte each. Index g of a plane is its bits
  // g * index_bits and following (bit p: bit p % 8 of byte p / 8, counted from the least significant).
  void (*pack)(const Rows& codes, int planes, uint8_t* block);
  void (*scan)(const Block& block, const BlockFactors& factors, int64_t groups, int planes, int parts,
               const ScalarQueryGroup& queries);
};

constexpr int half_byte_bits = 4;
// Makes a sum of signed half bytes positive.
constexpr int64_t table_bias(int64_t index_bits) { return 8 * index_bits; }
// Codes of a block for look-ups.
constexpr int64_t most_lookup_rows = 256;

struct ScalarKernels {
  // Codes as Kernels::pack_levels of the same instruction set leaves them, in bytes (`wide`, more than 4 bits) or in
  // half bytes; `words` level_words each. Queries of one part are s; of two, 128 * first + second = s.
  void (*scan)(const Block& block, const BlockFactors& factors, int64_t words, bool wide, int parts,
               const ScalarQueryGroup& queries);
  // Factors as codes have them beside them, to those of a block, with zeros up to a whole number of groups of codes.
  void (*lay_out)(const float* factors, int64_t count, int64_t dim, const BlockFactors& out);
  // Offers codes by their products with each part of one query, as RowKernels::multiply_levels leaves them.
  void (*offer_rows)(const Block& block, const BlockFactors& factors, const int32_t* const* products, int parts,
                     const ScalarQuery& query, Candidates& candidates);
  const ScalarLookups* lookups;  // or null
};

namespace generic {
extern const ScalarKernels scalar_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const ScalarKernels scalar_kernels;
}
namespace avx512vnni {
extern const ScalarKernels scalar_kernels;
}
#endif

}  // namespace fastembed::search
