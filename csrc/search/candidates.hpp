// The best codes of one query, collected while codes stream past. Plain data: files of every instruction set include
// it.
#pragma once

#include <cstdint>

namespace fastembed::search {

// A buffer of entries `key << 32 | id`, in the ascending order of ids in which codes are offered. Smaller keys are
// better. A full buffer is cut back to its k best (`keep_best`), whose worst key is the limit from then on: since ids
// ascend, a later key equal to it loses the tie, and `key < limit` is the whole test. A range search has a fixed limit
// and gives a full buffer more memory (`grow`).
struct Candidates {
  uint64_t* entries;  // room for capacity + most_added
  int64_t count;      // less than capacity between additions
  int64_t capacity;   // more than k, unless it holds every code there is
  int64_t k;
  uint32_t limit;
  void (*make_room)(Candidates&);
};

// Entries that may be written before `count` is looked at.
constexpr int64_t most_added = 16;

constexpr uint32_t key_of(uint64_t entry) { return static_cast<uint32_t>(entry >> 32); }
constexpr uint32_t id_of(uint64_t entry) { return static_cast<uint32_t>(entry); }

// Keeps the k smallest entries, in their order, and lowers the limit to the largest key among them. Nothing happens
// while there are fewer than k.
void keep_best(Candidates& candidates);

// Doubles a buffer that malloc gave. Where there is no memory it is emptied, and k becomes `out_of_memory`.
void grow(Candidates& candidates);
constexpr int64_t out_of_memory = -1;

// Sorts entries in ascending order of ids by (key, id). `scratch` has room for as many.
void sort_by_key(uint64_t* entries, int64_t count, uint64_t* scratch);

namespace {

// Counts `added` entries that were written behind the others.
inline void count_added(Candidates& candidates, int64_t added) {
  candidates.count += added;
  if (candidates.count >= candidates.capacity) candidates.make_room(candidates);
}

// Adds an entry if its key is still below the limit.
inline void add_candidate(Candidates& candidates, uint32_t key, uint32_t id) {
  if (key >= candidates.limit) return;
  candidates.entries[candidates.count] = static_cast<uint64_t>(key) << 32 | id;
  count_added(candidates, 1);
}

}  // namespace
}  // namespace fastembed::search
