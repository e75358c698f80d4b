// Which tokens a sequence has and which of them are valid, found on the device: what pooling and its backward share.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/device_reduce.cuh"
#include "pooling/pooling.hpp"

namespace fastembed::pooling::cuda {

constexpr float norm_eps = 1e-12f;

// Of one launch, whose parameters hold them.
constexpr int most_exits = 16;
constexpr int most_prefixes = 128;

// A Batch and its mode, as a kernel's parameter.
struct DeviceBatch {
  int64_t sequences;
  int64_t tokens;
  Mask mask;        // data is null without a mask
  Offsets offsets;  // data is null when padded
  Mode mode;
};

inline DeviceBatch to_device(const Batch& batch, Mode mode) {
  DeviceBatch result = {batch.sequences, batch.tokens, {}, {}, mode};
  if (batch.mask != nullptr) result.mask = *batch.mask;
  if (batch.offsets != nullptr) result.offsets = *batch.offsets;
  return result;
}

// Tokens [begin, end) of a sequence: positions in its row of the batch, or in the packed tensor.
struct Span {
  int64_t sequence;
  int64_t begin;
  int64_t end;
};

__device__ inline int64_t offset(const DeviceBatch& batch, int64_t index) {
  const int64_t position = index * batch.offsets.stride;
  const int64_t value = batch.offsets.is_int64 ? static_cast<const int64_t*>(batch.offsets.data)[position]
                                               : static_cast<const int32_t*>(batch.offsets.data)[position];
  return value < 0 ? 0 : value < batch.tokens ? value : batch.tokens;
}

__device__ inline Span whole_sequence(const DeviceBatch& batch, int64_t sequence) {
  if (batch.offsets.data == nullptr) return {sequence, 0, batch.tokens};
  return {sequence, offset(batch, sequence), offset(batch, sequence + 1)};
}

// The last sequence of which first(sequence) <= value, where first rises with the sequences; 0 if there is none.
template <class First>
__device__ int64_t last_sequence_from(const DeviceBatch& batch, int64_t value, First first) {
  int64_t sequence = 0;
  for (int64_t end = batch.sequences; end - sequence > 1;) {
    const int64_t middle = (sequence + end) / 2;
    if (first(middle) <= value) {
      sequence = middle;
    } else {
      end = middle;
    }
  }
  return sequence;
}

__device__ inline bool is_valid(const DeviceBatch& batch, int64_t sequence, int64_t token) {
  const Mask& mask = batch.mask;
  if (mask.data == nullptr) return true;
  const int64_t position = sequence * mask.sequence_stride + token * mask.token_stride;
  uint64_t bits = 0;
  switch (mask.element_size) {
    case 1:
      bits = static_cast<const uint8_t*>(mask.data)[position];
      break;
    case 2:
      bits = static_cast<const uint16_t*>(mask.data)[position];
      break;
    case 4:
      bits = static_cast<const uint32_t*>(mask.data)[position];
      break;
    default:
      bits = static_cast<const uint64_t*>(mask.data)[position];
  }
  return bits != 0 && bits != mask.negative_zero;
}

// The first valid token of a sequence, or its end; found by a whole warp.
__device__ inline int64_t first_valid_token(const DeviceBatch& batch, const Span& whole) {
  if (batch.mask.data == nullptr) return whole.begin;
  for (int64_t begin = whole.begin; begin < whole.end; begin += device::warp_threads) {
    const int64_t token = begin + threadIdx.x % device::warp_threads;
    const unsigned valid =
        __ballot_sync(device::full_warp, token < whole.end && is_valid(batch, whole.sequence, token));
    if (valid != 0) return begin + __ffs(valid) - 1;
  }
  return whole.end;
}

// What a mode needs to know of the valid tokens of a sequence.
struct Extent {
  int64_t count;
  int64_t token;  // that cls and lasttoken take; from which weightedmean counts
  float divisor;
};

// Found by a whole block of `threads` threads.
template <int threads>
__device__ Extent extent_of(const DeviceBatch& batch, const Span& whole) {
  const auto add = [](int64_t a, int64_t b) { return a + b; };
  const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const auto larger = [](int64_t a, int64_t b) { return a < b ? b : a; };
  int64_t count = 0;
  int64_t position_sum = 0;
  int64_t first = whole.end;
  int64_t last = -1;
  for (int64_t token = whole.begin + threadIdx.x; token < whole.end; token += threads) {
    if (!is_valid(batch, whole.sequence, token)) continue;
    count += 1;
    position_sum += token;
    first = smaller(first, token);
    last = token;
  }
  count = device::block_reduce<threads, int64_t>(count, 0, add);
  Extent extent = {count, 0, 1.0f};
  switch (batch.mode) {
    case Mode::mean:
      extent.divisor = static_cast<float>(count);
      break;
    case Mode::mean_sqrt_len:
      extent.divisor = sqrtf(static_cast<float>(count));
      break;
    case Mode::weightedmean: {
      extent.token = device::block_reduce<threads, int64_t>(first, whole.end, smaller);
      position_sum = device::block_reduce<threads, int64_t>(position_sum, 0, add);
      extent.divisor = static_cast<float>(position_sum - count * (extent.token - 1));
      break;
    }
    case Mode::cls:
      extent.token = device::block_reduce<threads, int64_t>(first, whole.end, smaller);
      break;
    case Mode::lasttoken:
      extent.token = device::block_reduce<threads, int64_t>(last, -1, larger);
      break;
    case Mode::max:
      break;
  }
  return extent;
}

}  // namespace fastembed::pooling::cuda
