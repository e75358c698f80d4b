#include "pooling/token_plan.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace fastembed::pooling {
namespace {

// Writes the positions of the valid ones among `tokens` tokens from an element of the mask on, and returns their
// number, or -1 for a value not allowed.
template <class Bits>
int64_t valid_positions(const Mask& mask, int64_t element, int64_t tokens, int64_t* positions) {
  const Bits* row = static_cast<const Bits*>(mask.data) + element;
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
  const bool packed = batch.offsets != nullptr;
  if (packed) check_offsets(batch);
  std::vector<Span> spans;
  spans.reserve(batch.sequences);
  for (int64_t b = 0; b < batch.sequences; ++b) {
    const int64_t start = packed ? offset_at(*batch.offsets, b) : 0;
    spans.push_back({start, packed ? offset_at(*batch.offsets, b + 1) - start : batch.tokens});
  }
  if (batch.mask != nullptr) {
    read_mask(*batch.mask, spans);
  } else {
    count_up(spans);
  }
}

void TokenPlan::read_mask(const Mask& mask, const std::vector<Span>& spans) {
  const ValidPositions valid_positions = valid_positions_for(mask.element_size);
  int64_t tokens = 0;
  for (const Span& span : spans) tokens += span.length;
  // One to spare: a position is written before it is known to count.
  positions_.reset(new int64_t[tokens + 1]);
  int64_t* next = positions_.get();
  for (size_t b = 0; b < spans.size(); ++b) {
    const int64_t element = static_cast<int64_t>(b) * mask.sequence_stride + spans[b].start * mask.token_stride;
    const int64_t count = valid_positions(mask, element, spans[b].length, next);
    if (count < 0) throw std::invalid_argument("attention_mask must hold only 0 and 1, got other values");
    add(spans[b], next, count);
    next += count;
  }
}

void TokenPlan::check_offsets(const Batch& batch) {
  const Offsets& offsets = *batch.offsets;
  bool rising = offset_at(offsets, 0) == 0 && offset_at(offsets, batch.sequences) == batch.tokens;
  for (int64_t b = 0; rising && b < batch.sequences; ++b) {
    const int64_t start = offset_at(offsets, b), end = offset_at(offsets, b + 1);
    rising = start <= end && end <= batch.tokens;
  }
  if (!rising) {
    throw std::invalid_argument("cu_seqlens must rise from 0 to the " + std::to_string(batch.tokens) +
                                " tokens of hidden_states");
  }
}

void TokenPlan::count_up(const std::vector<Span>& spans) {
  int64_t longest = 0;
  for (const Span& span : spans) longest = std::max(longest, span.length);
  positions_.reset(new int64_t[longest]);
  for (int64_t t = 0; t < longest; ++t) positions_[t] = t;
  for (const Span& span : spans) add(span, positions_.get(), span.length);
}

void TokenPlan::add(const Span& span, const int64_t* index, int64_t count) {
  if (count > 1 && mode_ == Mode::cls) count = 1;
  if (count > 1 && mode_ == Mode::lasttoken) {
    index += count - 1;
    count = 1;
  }
  sequences_.push_back({span.start, index, count, divisor_for(mode_, index, count), span.length});
  tokens_to_read_ += count;
}

}  // namespace fastembed::pooling
