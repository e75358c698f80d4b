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
  const int32_t* biases;       // look-ups only: products are sums less these
  const ScalarQuery* queries;  // of all
  const uint32_t* members;
  int64_t count;  // of members
  Candidates* candidates;
};

// Bits of the parts of a query that look-ups take.
constexpr int half_byte_bits = 4;

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
  // By look-up, or null. The parts of a query are half bytes, the least significant first.
  void (*scan_lookups)(const Block& block, const BlockFactors& factors, int64_t groups, int planes, int parts,
                       const ScalarQueryGroup& queries);
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
