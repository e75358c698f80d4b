// What the tokens of a column are reduced by, one after another and then part by part.
#pragma once

#include <cmath>
#include <cstdint>

namespace fastembed::pooling::cuda {

struct WeightedSum {
  using Value = float;
  static constexpr int blocks = 4;  // per multiprocessor, which registers are allotted for
  __device__ static Value identity() { return 0.0f; }
  __device__ static Value combine(Value a, Value b) { return a + b; }
  __device__ static Value add(Value sum, float weight, float x, int64_t) { return fmaf(weight, x, sum); }
};

// NaN once a NaN was seen.
struct Maximum {
  using Value = float;
  static constexpr int blocks = 4;
  __device__ static Value identity() { return -INFINITY; }
  __device__ static Value combine(Value a, Value b) { return b > a || b != b ? b : a; }
  __device__ static Value add(Value largest, float, float x, int64_t) { return combine(largest, x); }
};

// The same, and the first token that it is of, where `a` is of tokens before those of `b`.
struct MaximumAndWinner {
  struct Value {
    float largest;
    int32_t token;
  };
  static constexpr int blocks = 3;
  __device__ static Value identity() { return {-INFINITY, -1}; }
  __device__ static Value combine(Value a, Value b) {
    const bool larger = b.largest > a.largest || (b.largest != b.largest && a.largest == a.largest);
    return b.token >= 0 && (larger || a.token < 0) ? b : a;
  }
  __device__ static Value add(Value best, float, float x, int64_t token) {
    return combine(best, {x, static_cast<int32_t>(token)});
  }
};

}  // namespace fastembed::pooling::cuda
