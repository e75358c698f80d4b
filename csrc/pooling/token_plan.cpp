#include "pooling/token_plan.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace fastembed::pooling {
namespace {

// Writes the positions of the valid tokens of one sequence and returns their number, or -1 for a value not allowed.
template <class Bits>
int64_t valid_positions(const Mask& mask, int64_t sequence, int64_t tokens, int64_t* positions) {
  const Bits* row = static_cast<const Bits*>(mask.data) + sequence * mask.sequence_stride;
  const Bits one = static_cast<Bits>(mask.one);
  const Bits negative_zero = static_cast<Bits>(mask.negative_zero);
  int64_t count = 0;
  bool allowed = true;
  for (int64_t t = 0; t < tokens; ++t) {
    const Bits value = row[t * mask.token_stride];
    positions[count] = t;
    count += value == one;
    allowed &= (value == one) | (value == 0) | (value == negative_zero);
  }
  return allowed ? count : -1;
}

using ValidPositions = int64_t (*)(const Mask&, int64_t, int64_t, int64_t*);

ValidPositions valid_positions_for(int64_t element_size) {
  switch (element_size) {
    case 1:
      return valid_positions<uint8_t>;
    case 2:
      return valid_positions<uint16_t>;
    case 4:
      return valid_positions<uint32_t>;
    default:
      return valid_positions<uint64_t>;
  }
}

int64_t offset_at(const Offsets& offsets, int64_t i) {
  return offsets.is_int64 ? static_cast<const int64_t*>(offsets.data)[i * offsets.stride]
                          : static_cast<const int32_t*>(offsets.data)[i * offsets.stride];
}

float divisor_for(Mode mode, const int64_t* index, int64_t count) {
  switch (mode) {
    case Mode::mean:
      return static_cast<float>(count);
    case Mode::mean_sqrt_len:
      return static_cast<float>(std::sqrt(static_cast<double>(count)));
    case Mode::weightedmean: {
      int64_t total = 0;
      for (int64_t i = 0; i < count; ++i) total += index[i] - index[0] + 1;
      return static_cast<float>(total);
    }
    default:
      return 1.f;
  }
}

}  // namespace

TokenPlan::TokenPlan(const Batch& batch, Mode mode) : mode_(mode) {
  sequences_.reserve(batch.sequences);
  if (batch.offsets != nullptr) {
    read_offsets(batch);
  } else if (batch.mask != nullptr) {
    read_mask(batch);
  } else {
    count_up_to(batch.tokens);
    for (int64_t b = 0; b < batch.sequences; ++b) add(0, positions_.get(), batch.tokens);
  }
}

void TokenPlan::read_mask(const Batch& batch) {
  const ValidPositions valid_positions = valid_positions_for(batch.mask->element_size);
  // One to spare: a position is written before it is known to count.
  positions_.reset(new int64_t[batch.sequences * batch.tokens + 1]);
  int64_t* next = positions_.get();
  for (int64_t b = 0; b < batch.sequences; ++b) {
    const int64_t count = valid_positions(*batch.mask, b, batch.tokens, next);
    if (count < 0) throw std::invalid_argument("attention_mask must hold only 0 and 1, got other values");
    add(0, next, count);
    next += count;
  }
}

void TokenPlan::read_offsets(const Batch& batch) {
  const Offsets& offsets = *batch.offsets;
  int64_t longest = 0;
  bool rising = offset_at(offsets, 0) == 0 && offset_at(offsets, batch.sequences) == batch.tokens;
  for (int64_t b = 0; rising && b < batch.sequences; ++b) {
    const int64_t start = offset_at(offsets, b), end = offset_at(offsets, b + 1);
    rising = start <= end && end <= batch.tokens;
    longest = std::max(longest, end - start);
  }
  if (!rising) {
    throw std::invalid_argument("cu_seqlens must rise from 0 to the " + std::to_string(batch.tokens) +
                                " tokens of hidden_states");
  }
  count_up_to(longest);
  for (int64_t b = 0; b < batch.sequences; ++b) {
    const int64_t start = offset_at(offsets, b);
    add(start, positions_.get(), offset_at(offsets, b + 1) - start);
  }
}

void TokenPlan::count_up_to(int64_t length) {
  positions_.reset(new int64_t[length]);
  for (int64_t t = 0; t < length; ++t) positions_[t] = t;
}

void TokenPlan::add(int64_t start, const int64_t* index, int64_t count) {
  if (count > 1 && mode_ == Mode::cls) count = 1;
  if (count > 1 && mode_ == Mode::lasttoken) {
    index += count - 1;
    count = 1;
  }
  sequences_.push_back({start, index, count, divisor_for(mode_, index, count)});
  tokens_to_read_ += count;
}

}  // namespace fastembed::pooling
