// The k smallest of a buffer of candidates, found by one warp for one query.
#pragma once

#include <climits>
#include <cstdint>

#include "common/device_reduce.cuh"

namespace fastembed::search::cuda {

using device::full_warp;
using device::warp_threads;

struct Candidate {
  int key;
  int id;
};

constexpr int no_limit = INT_MAX;

__device__ inline int lane_index() { return threadIdx.x % warp_threads; }
__device__ inline int lanes_before(unsigned ballot) { return __popc(ballot & ((1u << lane_index()) - 1)); }

__device__ inline int count_up_to(const Candidate* buffer, int count, int key) {
  int found = 0;
  for (int i = lane_index(); i < count; i += warp_threads) found += buffer[i].key <= key;
  return device::warp_reduce(found, [](int a, int b) { return a + b; });
}

// Cuts `count` candidates, more than k, back to the k smallest, equal keys in the order in which they stand, which is
// kept. Returns the largest key left.
__device__ inline int keep_smallest(Candidate* buffer, int count, int k) {
  __syncwarp();
  int64_t low = INT_MIN;
  int64_t high = INT_MAX;
  while (low < high) {  // the smallest key up to which there are k
    const int64_t middle = (low + high) >> 1;
    if (count_up_to(buffer, count, static_cast<int>(middle)) >= k) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const int limit = static_cast<int>(low);
  const int below = limit == INT_MIN ? 0 : count_up_to(buffer, count, limit - 1);
  int kept = 0;
  int ties = 0;
  for (int first = 0; first < count; first += warp_threads) {
    const int i = first + lane_index();
    const Candidate candidate = i < count ? buffer[i] : Candidate{no_limit, -1};
    const bool is_tie = i < count && candidate.key == limit;
    const unsigned tie_ballot = __ballot_sync(full_warp, is_tie);
    const bool stays = (i < count && candidate.key < limit) || (is_tie && ties + lanes_before(tie_ballot) < k - below);
    const unsigned ballot = __ballot_sync(full_warp, stays);
    __syncwarp();  // all have read what is overwritten
    if (stays) buffer[kept + lanes_before(ballot)] = candidate;
    kept += __popc(ballot);
    ties += __popc(tie_ballot);
  }
  __syncwarp();
  return limit;
}

}  // namespace fastembed::search::cuda
