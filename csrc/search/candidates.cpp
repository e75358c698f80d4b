#include "search/candidates.hpp"

#include <algorithm>

namespace fastembed::search {
namespace {

constexpr int bin_bits = 11;

uint32_t key_of(uint64_t entry) { return static_cast<uint32_t>(entry >> 32); }

// Moves the entries that `belongs` to the front and returns their end. Without branches: which entries belong is as
// good as random, and half the branches would be mispredicted.
template <class Belongs>
uint64_t* partition(uint64_t* begin, uint64_t* end, const Belongs& belongs) {
  uint64_t* front = begin;
  for (uint64_t* entry = begin; entry != end; ++entry) {
    const uint64_t moved = *entry;
    *entry = *front;
    *front = moved;
    front += belongs(moved);
  }
  return front;
}

}  // namespace

void compact(Candidates& candidates) {
  if (candidates.count < candidates.k) return;
  uint64_t* const begin = candidates.entries;
  uint64_t* const end = begin + candidates.count;

  // A histogram of the keys, exact for the few keys of Hamming distances, finds the bin of the k-th smallest.
  uint32_t smallest = key_of(*begin), largest = smallest;
  for (const uint64_t* entry = begin; entry != end; ++entry) {
    smallest = std::min(smallest, key_of(*entry));
    largest = std::max(largest, key_of(*entry));
  }
  int shift = 0;
  while ((largest - smallest) >> shift >> bin_bits != 0) ++shift;
  const auto bin_of = [=](uint64_t entry) { return (key_of(entry) - smallest) >> shift; };
  int64_t histogram[1 << bin_bits] = {};
  for (const uint64_t* entry = begin; entry != end; ++entry) ++histogram[bin_of(*entry)];
  uint32_t last_bin = 0;
  for (int64_t below = histogram[0]; below < candidates.k; below += histogram[last_bin]) ++last_bin;

  // Entries of smaller bins stay, and as many of that bin as there is room for.
  uint64_t* const bin_end = partition(begin, end, [=](uint64_t entry) { return bin_of(entry) <= last_bin; });
  uint64_t* const bin_begin = partition(begin, bin_end, [=](uint64_t entry) { return bin_of(entry) < last_bin; });
  uint64_t* const last = begin + candidates.k - 1;
  std::nth_element(bin_begin, last, bin_end);
  candidates.count = candidates.k;
  candidates.limit = key_of(*last);
}

}  // namespace fastembed::search
