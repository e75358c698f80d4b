// What one warp multiplies: the 64 output features of a panel by 8 or more tokens, on int8 tensor cores.
//
// The packed layout (fastembed/reference/qmatmul.py) is the order in which mma wants its operand: a lane with
// g = lane / 4 and t = lane % 4 takes four neighbouring words of quad t, 32 codes in `bits` registers, and once spread
// to bytes they are rows g and g + 8 of four 16-row operands. So weights go from memory to tensor cores without a
// shuffle; row g of operand m is output feature 8 g + 2 m, and row g + 8 the one after it, which leaves each lane with
// eight neighbouring outputs of each of its tokens.
#pragma once

#include <cstdint>

#include "common/device_dtype.cuh"
#include "common/device_reduce.cuh"
#include "common/tensor_core.cuh"
#include "qmatmul/kernels.hpp"

namespace fastembed::qmatmul::cuda {

using device::vector_bytes;
using device::warp_threads;

constexpr int operands = 4;         // of 16 output features, in a panel
constexpr int lane_features = 8;    // neighbours that a lane has of each token
constexpr int operand_tokens = 8;   // of the other operand
constexpr int block_features = 16;  // input features of half an mma: what every group is a multiple of

// The bytes that a panel's codes take for 64 input features: `bits` copies of 16 bytes for each lane of a warp.
constexpr int stage_features = 64;
template <int bits>
constexpr int stage_bytes = stage_features / 4 * 32 * bits;

__device__ inline int lane_index() { return threadIdx.x % warp_threads; }

// The codes of a lane: `quad` of the stage, words 4 g .. 4 g + 3. Neighbouring lanes read neighbouring bytes, so no two
// hit the same bank.
template <int bits>
__device__ inline void load_codes(const uint8_t* stage, int quad, uint32_t (&words)[bits]) {
  const uint8_t* const source = stage + (quad * 8 + lane_index() / 4) * 4 * bits;
  if constexpr (bits % 4 == 0) {
#pragma unroll
    for (int i = 0; i < bits; i += 4) {
      const uint4 vector = reinterpret_cast<const uint4*>(source)[i / 4];
      words[i] = vector.x;
      words[i + 1] = vector.y;
      words[i + 2] = vector.z;
      words[i + 3] = vector.w;
    }
  } else if constexpr (bits % 2 == 0) {
#pragma unroll
    for (int i = 0; i < bits; i += 2) {
      const uint2 vector = reinterpret_cast<const uint2*>(source)[i / 2];
      words[i] = vector.x;
      words[i + 1] = vector.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < bits; ++i) words[i] = reinterpret_cast<const uint32_t*>(source)[i];
  }
}

// 32 codes, one after another, to one byte each: bytes[2 m] are four input features of output feature 8 g + 2 m, and
// bytes[2 m + 1] of the one after it.
template <int bits>
__device__ inline void spread(const uint32_t (&words)[bits], uint32_t (&bytes)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int first = 4 * bits * i / 32;
    const int shift = 4 * bits * i % 32;
    uint32_t field = words[first] >> shift;
    if (shift + 4 * bits > 32) field = __funnelshift_r(words[first], words[first + 1], shift);
    if constexpr (bits == 8) {
      bytes[i] = field;
    } else {
      // Halve the fields twice: two codes to each half, then one to each byte.
      constexpr uint32_t code = (1u << bits) - 1;
      constexpr uint32_t pair = (1u << 2 * bits) - 1;
      constexpr uint32_t codes = code | code << 16;
      field = (field & pair) | ((field << (16 - 2 * bits)) & pair << 16);
      bytes[i] = (field & codes) | ((field << (8 - bits)) & codes << 8);
    }
  }
}

// What the codes of one group stand for, for the lane's eight output features.
struct GroupSteps {
  float scales[lane_features];
  float zeros[lane_features];
};

__device__ inline GroupSteps load_steps(const Steps& steps, float midpoint, int64_t group_of_panel) {
  const int64_t index = group_of_panel * panel_width + lane_index() / 4 * lane_features;
  GroupSteps group;
  device::load_eight(steps.scales, steps.dtype, index, group.scales);
  if (steps.kind == Zeros::fractional) {
    device::load_eight(steps.zeros, steps.dtype, index, group.zeros);
  } else if (steps.kind == Zeros::codes) {
    const uint2 codes = *reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(steps.zeros) + index);
#pragma unroll
    for (int i = 0; i < lane_features; ++i) {
      group.zeros[i] = static_cast<float>((i < 4 ? codes.x : codes.y) >> 8 * (i % 4) & 0xff);
    }
  } else {
#pragma unroll
    for (int i = 0; i < lane_features; ++i) group.zeros[i] = midpoint;
  }
  return group;
}

// How the integers of a group become floats.
struct Conversion {
  // Where sums stay below 2^22 in size they are counted from the integer whose bits, read as a float, are 1.5 * 2^23:
  // then that float less 1.5 * 2^23 is the sum, and no conversion, which is slow, is needed. Else from 0.
  int start;
  float origin;  // what is taken off the codes where the zero point is no integer
  bool stored;   // else each zero point is taken off whole
  bool shifted;  // something of the zero point is left after `origin`
};
constexpr int float_start = 0x4b400000;
constexpr float float_offset = 12582912.0f;

// D[m][n] is 16 output features by 8 tokens; see tensor_core.cuh for who holds what.
template <int token_operands>
struct WarpTile {
  int dots[operands][token_operands][4];
  int sums[token_operands];  // of token lane / 4, over the lane's own input features
  float totals[operands][token_operands][4];

  __device__ void clear(const Conversion& conversion) {
    start_group(conversion);
#pragma unroll
    for (auto& row : totals) {
#pragma unroll
      for (auto& tile : row) {
#pragma unroll
        for (float& total : tile) total = 0.0f;
      }
    }
  }

  __device__ void start_group(const Conversion& conversion) {
#pragma unroll
    for (auto& row : dots) {
#pragma unroll
      for (auto& tile : row) {
#pragma unroll
        for (int& dot : tile) dot = conversion.start;
      }
    }
#pragma unroll
    for (int& sum : sums) sum = 0;
  }

  // Adds the products of 32 input features; those of a group that ends or begins in their midst are zero in `tokens`.
  __device__ void multiply(const uint32_t (&weights)[operands][4], const uint32_t (&tokens)[token_operands][2]) {
    constexpr int ones = 0x01010101;
#pragma unroll
    for (int n = 0; n < token_operands; ++n) {
#pragma unroll
      for (int m = 0; m < operands; ++m) device::mma_u8_s8(dots[m][n], weights[m], tokens[n]);
#pragma unroll
      for (const uint32_t word : tokens[n]) sums[n] = __dp4a(static_cast<int>(word), ones, sums[n]);
    }
  }

  // totals += scale * (dot - origin * sum) + scale * (origin - zero) * sum, the first difference exact.
  __device__ void finish_group(const GroupSteps& steps, const Conversion& conversion) {
#pragma unroll
    for (int n = 0; n < token_operands; ++n) {
      int sum = sums[n];
      sum += __shfl_xor_sync(device::full_warp, sum, 1);
      sum += __shfl_xor_sync(device::full_warp, sum, 2);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        // The sum of token 2 t + j, which lanes 4 (2 t + j) .. hold.
        const int of_token = __shfl_sync(device::full_warp, sum, lane_index() % 4 * 8 + 4 * j);
#pragma unroll
        for (int i = 0; i < lane_features; ++i) {
          const int dot = dots[i / 2][n][i % 2 * 2 + j];
          float& total = totals[i / 2][n][i % 2 * 2 + j];
          const float origin = conversion.stored ? steps.zeros[i] : conversion.origin;
          const auto float_sum = static_cast<float>(of_token);
          float centred;
          if (conversion.start != 0) {
            centred = __int_as_float(dot) - fmaf(origin, float_sum, float_offset);
          } else {
            centred = static_cast<float>(dot - static_cast<int>(origin) * of_token);
          }
          total = fmaf(steps.scales[i], centred, total);
          if (conversion.shifted) total = fmaf(steps.scales[i] * (origin - steps.zeros[i]), float_sum, total);
        }
      }
    }
    start_group(conversion);
  }

  // The lane's outputs of token 2 t + j of operand n.
  __device__ void outputs(int n, int j, float (&values)[lane_features]) const {
#pragma unroll
    for (int i = 0; i < lane_features; ++i) values[i] = totals[i / 2][n][i % 2 * 2 + j];
  }
};

}  // namespace fastembed::qmatmul::cuda
