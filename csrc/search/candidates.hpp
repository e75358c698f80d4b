// The best codes of one query, collected while codes stream past. Plain data: files of every instruction set include
// it.
#pragma once

#include <cstdint>

namespace fastembed::search {

// An unordered buffer of entries `key << 32 | id`, cut back to its k smallest whenever it is full. Smaller keys are
// better. Ids must be offered in ascending order: then a key equal to the k-th best so far loses against it whatever
// comes later, `key < limit` is the whole test, and ties go to the smaller id.
struct Candidates {
  uint64_t* entries;  // room for capacity + most_added
  int64_t count;      // less than capacity between additions
  int64_t capacity;   // more than k, unless it holds every code there is
  int64_t k;
  uint32_t limit;
};

// Entries that may be written before `count` is looked at.
constexpr int64_t most_added = 8;

// Keeps the k smallest entries, in no order, and lowers the limit to the largest key among them.
void compact(Candidates& candidates);

namespace {

// Counts `added` entries that were written behind the others.
inline void count_added(Candidates& candidates, int64_t added) {
  candidates.count += added;
  if (candidates.count >= candidates.capacity) compact(candidates);
}

// Adds an entry if its key is still below the limit.
inline void add_candidate(Candidates& candidates, uint32_t key, uint32_t id) {
  if (key >= candidates.limit) return;
  candidates.entries[candidates.count] = static_cast<uint64_t>(key) << 32 | id;
  count_added(candidates, 1);
}

}  // namespace
}  // namespace fastembed::search
