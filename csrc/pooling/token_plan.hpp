// Which tokens each sequence of a batch consists of, found once per call and shared by all exits.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "pooling/pooling.hpp"

namespace fastembed::pooling {

class TokenPlan {
 public:
  struct Sequence {
    int64_t start;         // first token of the sequence in a packed batch; 0 in a padded one
    const int64_t* index;  // its valid tokens, ascending, counted from `start`
    int64_t count;
    float divisor;   // of their sum, or weighted sum
    int64_t length;  // of the sequence, padding and other invalid tokens included
  };

  // Throws std::invalid_argument when the mask holds anything but 0 and 1, or the offsets do not rise from 0 to the
  // number of tokens.
  TokenPlan(const Batch& batch, Mode mode);

  const Sequence& operator[](int64_t sequence) const { return sequences_[sequence]; }
  int64_t tokens_to_read() const { return tokens_to_read_; }

 private:
  struct Span {
    int64_t start;
    int64_t length;
  };

  static void check_offsets(const Batch& batch);
  void read_mask(const Mask& mask, const std::vector<Span>& spans);
  void count_up(const std::vector<Span>& spans);
  void add(const Span& span, const int64_t* index, int64_t count);

  Mode mode_;
  std::vector<Sequence> sequences_;
  std::unique_ptr<int64_t[]> positions_;
  int64_t tokens_to_read_ = 0;
};

}  // namespace fastembed::pooling
