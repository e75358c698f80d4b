// The first of the indices that threads report in any order, such as that of a row with a value that is not finite.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>

namespace fastembed {

class First {
 public:
  void offer(int64_t index) {
    for (int64_t known = first_; index < known && !first_.compare_exchange_weak(known, index);) {
    }
  }
  // -1: none was reported.
  int64_t index() const { return first_ == none ? -1 : first_.load(); }

 private:
  static constexpr int64_t none = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> first_{none};
};

}  // namespace fastembed
