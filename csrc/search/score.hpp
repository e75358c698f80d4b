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

}  // namespace
}  // namespace fastembed::search
