#include "search/candidates.hpp"

#include <algorithm>
#include <cstdlib>

namespace fastembed::search {
namespace {

constexpr int digit_bits = 11;
constexpr uint32_t digits = 1 << digit_bits;
// Clearing counters costs more than comparing so few entries.
constexpr int64_t fewest_counted = 1024;

struct KeyRange {
  uint32_t smallest, largest;
};

KeyRange range_of_keys(const uint64_t* begin, const uint64_t* end) {
  KeyRange range = {key_of(*begin), key_of(*begin)};
  for (const uint64_t* entry = begin; entry != end; ++entry) {
    range.smallest = std::min(range.smallest, key_of(*entry));
    range.largest = std::max(range.largest, key_of(*entry));
  }
  return range;
}

int bits_beyond_a_digit(uint32_t span) {
  int shift = 0;
  while (span >> shift >= digits) ++shift;
  return shift;
}

struct Rank {
  uint32_t key;   // the k-th smallest
  int64_t below;  // entries with a smaller key
};

// A histogram of the leading bits of the keys finds the bin of the k-th smallest, another one the bin within that bin.
// The few keys of Hamming distances need only one.
Rank rank_of_many(const uint64_t* begin, const uint64_t* end, int64_t k) {
  const KeyRange range = range_of_keys(begin, end);
  uint32_t low = range.smallest, span = range.largest - range.smallest;  // the k-th key is in [low, low + span]
  for (int64_t below = 0;;) {
    const int shift = bits_beyond_a_digit(span);
    int64_t histogram[digits] = {};
    for (const uint64_t* entry = begin; entry != end; ++entry) {
      const uint32_t above = key_of(*entry) - low;  // wraps around for smaller keys
      if (above <= span) ++histogram[above >> shift];
    }
    uint32_t bin = 0;
    while (below + histogram[bin] < k) below += histogram[bin++];
    low += bin << shift;
    if (shift == 0) return {low, below};
    span = (uint32_t{1} << shift) - 1;
  }
}

Rank rank_of_few(const uint64_t* begin, const uint64_t* end, int64_t k) {
  uint32_t keys[fewest_counted];
  uint32_t* const keys_end = std::transform(begin, end, keys, key_of);
  std::nth_element(keys, keys + k - 1, keys_end);
  const uint32_t last = keys[k - 1];
  return {last, std::count_if(keys, keys + k - 1, [=](uint32_t key) { return key < last; })};
}

Rank rank(const uint64_t* begin, const uint64_t* end, int64_t k) {
  return end - begin < fewest_counted ? rank_of_few(begin, end, k) : rank_of_many(begin, end, k);
}

}  // namespace

void keep_best(Candidates& candidates) {
  if (candidates.count < candidates.k) return;
  uint64_t* const end = candidates.entries + candidates.count;
  const Rank last = rank(candidates.entries, end, candidates.k);
  // Of the entries with the last key the first ones stay, which have the smallest ids. Without branches: which entries
  // stay is as good as random, and half the branches would be mispredicted.
  int64_t room = candidates.k - last.below;
  uint64_t* kept = candidates.entries;
  for (const uint64_t* entry = candidates.entries; entry != end; ++entry) {
    const uint64_t moved = *entry;
    const bool tied = key_of(moved) == last.key;
    *kept = moved;
    kept += (key_of(moved) < last.key) | (tied & (room > 0));
    room -= tied;
  }
  candidates.count = candidates.k;
  candidates.limit = last.key;
}

void grow(Candidates& candidates) {
  const int64_t capacity = 2 * candidates.capacity;
  const auto bytes = static_cast<size_t>(capacity + most_added) * sizeof(uint64_t);
  if (void* const larger = std::realloc(candidates.entries, bytes)) {
    candidates.entries = static_cast<uint64_t*>(larger);
    candidates.capacity = capacity;
  } else {
    candidates.count = 0;
    candidates.k = out_of_memory;
  }
}

void sort_by_key(uint64_t* entries, int64_t count, uint64_t* scratch) {
  if (count < fewest_counted / 4) {
    std::sort(entries, entries + count);
    return;
  }
  const KeyRange range = range_of_keys(entries, entries + count);
  uint64_t *from = entries, *to = scratch;
  for (int shift = 0; shift < 32 && (range.largest - range.smallest) >> shift != 0; shift += digit_bits) {
    const auto digit_of = [=](uint64_t entry) { return (key_of(entry) - range.smallest) >> shift & (digits - 1); };
    int64_t first[digits + 1] = {};
    for (int64_t i = 0; i < count; ++i) ++first[digit_of(from[i]) + 1];
    for (uint32_t digit = 0; digit < digits; ++digit) first[digit + 1] += first[digit];
    for (int64_t i = 0; i < count; ++i) to[first[digit_of(from[i])]++] = from[i];
    std::swap(from, to);
  }
  if (from != entries) std::copy_n(from, count, entries);
}

}  // namespace fastembed::search
