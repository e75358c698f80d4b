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
  const float* data;
  int64_t stride;
};

struct ScalarQueryGroup {
  const int8_t* data;          // [queries, parts, bytes]
  int64_t bytes;               // of a part
  const ScalarQuery* queries;  // of all
  const uint32_t* members;
  int64_t count;  // of members
  Candidates* candidates;
};

struct ScalarKernels {
  // Codes as Kernels::pack_levels of the same instruction set leaves them, in bytes (`wide`, more than 4 bits) or in
  // half bytes; `words` level_words each. Queries of one part are s; of two, 128 * first + second = s.
  void (*scan)(const Block& block, const BlockFactors& factors, int64_t words, bool wide, int parts,
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
