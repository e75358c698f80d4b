#include "search/candidates.hpp"

#include <algorithm>

namespace fastembed::search {

void compact(Candidates& candidates) {
  if (candidates.count < candidates.k) return;
  uint64_t* const last = candidates.entries + candidates.k - 1;
  std::nth_element(candidates.entries, last, candidates.entries + candidates.count);
  candidates.count = candidates.k;
  candidates.limit = static_cast<uint32_t>(*last >> 32);
}

}  // namespace fastembed::search
