// Small scalar helpers of the kernels. Included by files of every instruction set.
#pragma once

#include <cstdint>

namespace fastembed::search {
namespace {

inline uint32_t key_of_score(float score) {
  int32_t bits;
  __builtin_memcpy(&bits, &score, sizeof bits);
  const int32_t ascending = bits ^ (bits >> 31 & INT32_MAX);  // orders as the floats do
  return static_cast<uint32_t>(INT32_MAX) - static_cast<uint32_t>(ascending);
}

inline float score_of_key(uint32_t key) {
  const int32_t ascending = static_cast<int32_t>(static_cast<uint32_t>(INT32_MAX) - key);
  const int32_t bits = ascending ^ (ascending >> 31 & INT32_MAX);
  float score;
  __builtin_memcpy(&score, &bits, sizeof score);
  return score;
}

// A bound on dot products in place of scores: what is not above it has no score above `limit`, with norms of codes
// whose inverse is at most `largest`. Rounding the product three times moves a score by less than the millionth taken
// off.
inline int32_t least_dot(float limit, float query_inverse_norm, float largest) {
  if (!(limit > 0)) return INT32_MIN;
  const float bound = limit / (query_inverse_norm * largest) * 0.999999f;
  return bound < 2147483520.0f ? static_cast<int32_t>(bound) : 2147483520;
}

}  // namespace
}  // namespace fastembed::search
