// The best codes of one query, collected while codes stream past. Plain data: files of every instruction set include
// it.
#pragma once

#include <cstdint>

namespace fastembed::search {

// An unordered buffer of entries `key << 32 | id`, cut back to its k smallest whenever it is full. Smaller keys are
// better. Ids must be offered in ascending order: then a key equal to the k-th best so far loses against it whatever
// comes later, `key < limit` is the whole test, and ties go to the smaller id.
struct Candidates {
  uint64_t* entries;
  int64_t count;
  int64_t capacity;  // more than k, unless it holds every code there is
  int64_t k;
  uint32_t limit;
};

// Keeps the k smallest entries, in no order, and lowers the limit to the largest key among them.
void compact(Candidates& candidates);

namespace {

// Call only with key < candidates.limit.
inline void add_candidate(Candidates& candidates, uint32_t key, uint32_t id) {
  candidates.entries[candidates.count++] = static_cast<uint64_t>(key) << 32 | id;
  if (candidates.count == candidates.capacity) compact(candidates);
}

}  // namespace
}  // namespace fastembed::search
