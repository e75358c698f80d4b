// Joins the chunks of a sequence, divides, and writes every prefix of the pooled vector: normalised, from one running
// sum of squares, or as int8 or packed bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/device_dtype.cuh"
#include "common/device_reduce.cuh"
#include "pooling/plan.cuh"
#include "pooling/reductions.cuh"
#include "pooling/sequences.cuh"

namespace fastembed::pooling::cuda {

constexpr int finish_threads = 256;

__device__ inline float joined_chunks(const Plan& plan, const float* sums, int64_t chunks, int column) {
  const bool largest = plan.batch.mode == Mode::max;
  float joined = sums[column];
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    const float next = sums[chunk * plan.columns + column];
    joined = largest ? Maximum::combine(joined, next) : WeightedSum::combine(joined, next);
  }
  return joined;
}

__device__ inline MaximumAndWinner::Value joined_winners(const Plan& plan, int64_t first, int64_t chunks, int column) {
  MaximumAndWinner::Value joined = MaximumAndWinner::identity();
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t index = first + chunk * plan.columns + column;
    joined = MaximumAndWinner::combine(joined, {plan.chunk_sums[index], plan.chunk_winners[index]});
  }
  return joined;
}

// Writes one prefix of a pooled vector as int8, 127 standing for its largest magnitude; zeros if that is not usable.
__device__ inline void write_int8(const float* pooled, int dim, float largest, int8_t* codes) {
  const bool usable = largest > 0.0f && largest < INFINITY;
  for (int column = threadIdx.x; column < dim; column += finish_threads) {
    codes[column] = usable ? static_cast<int8_t>(rintf(pooled[column] / largest * 127.0f)) : int8_t{0};
  }
}

// Writes the signs of one prefix, eight to a byte, the first in its highest bit.
__device__ inline void write_bits(const float* pooled, int dim, uint8_t* codes) {
  for (int byte = threadIdx.x; byte * 8 < dim; byte += finish_threads) {
    unsigned bits = 0;
    for (int i = 0; i < 8; ++i) {
      const int column = byte * 8 + i;
      bits = bits * 2 + (column < dim && pooled[column] > 0.0f);
    }
    codes[byte] = static_cast<uint8_t>(bits);
  }
}

// What prefixes are written as.
struct Floats {};
struct Int8 {};
struct Bits {};

// Grid: sequences, exits.
template <class Form>
__global__ void __launch_bounds__(finish_threads) finish_rows(const __grid_constant__ Plan plan) {
  const int64_t sequence = blockIdx.x;
  const DeviceExit& exit = plan.exits[blockIdx.y];
  const DeviceBatch& batch = plan.batch;
  const Span whole = whole_sequence(batch, sequence);
  const Extent extent = extent_of<finish_threads>(batch, whole);

  const bool picks = batch.mode == Mode::cls || batch.mode == Mode::lasttoken;
  const int64_t picked = sequence * exit.sequence_stride + extent.token * exit.token_stride;
  const int64_t first = (blockIdx.y * plan.slots + first_slot(batch, sequence)) * plan.columns;
  const int64_t chunks = chunks_of(whole.end - whole.begin);
  float* const pooled = exit.pooled + sequence * exit.columns;
  for (int column = threadIdx.x; column < exit.columns; column += finish_threads) {
    float value = 0.0f;
    int32_t winner = -1;
    if (extent.count > 0) {
      if (picks) {
        value = device::load(exit.data, plan.dtype, picked + column);
      } else if (exit.winner != nullptr) {
        const MaximumAndWinner::Value best = joined_winners(plan, first, chunks, column);
        value = best.largest;
        winner = best.token;
      } else {
        value = joined_chunks(plan, plan.chunk_sums + first, chunks, column) / extent.divisor;
      }
    }
    pooled[column] = value;
    if (exit.winner != nullptr) exit.winner[sequence * exit.columns + column] = winner;
  }
  __syncthreads();

  [[maybe_unused]] float squares = 0.0f;  // of the columns before `seen`
  [[maybe_unused]] float largest = 0.0f;  // magnitude among them
  int seen = 0;
  for (int i = 0; i < exit.prefixes; ++i) {
    const DevicePrefix& prefix = plan.prefixes[exit.first_prefix + i];
    if constexpr (std::is_same_v<Form, Bits>) {
      write_bits(pooled, prefix.dim, static_cast<uint8_t*>(prefix.data) + sequence * ((prefix.dim + 7) / 8));
    } else if constexpr (std::is_same_v<Form, Int8>) {
      float more = 0.0f;
      for (int column = seen + threadIdx.x; column < prefix.dim; column += finish_threads) {
        more = Maximum::combine(more, fabsf(pooled[column]));
      }
      more = device::block_reduce<finish_threads>(more, 0.0f, [](float a, float b) { return Maximum::combine(a, b); });
      largest = Maximum::combine(largest, more);
      write_int8(pooled, prefix.dim, largest, static_cast<int8_t*>(prefix.data) + sequence * prefix.dim);
    } else {
      float norm = 1.0f;
      if (plan.normalize) {
        float more = 0.0f;
        for (int column = seen + threadIdx.x; column < prefix.dim; column += finish_threads) {
          more = fmaf(pooled[column], pooled[column], more);
        }
        squares += device::block_reduce<finish_threads>(more, 0.0f, [](float a, float b) { return a + b; });
        norm = sqrtf(squares);
        if (norm < norm_eps) norm = norm_eps;  // not fmaxf, which would drop a NaN
      }
      for (int column = threadIdx.x; column < prefix.dim; column += finish_threads) {
        device::store(prefix.data, static_cast<DType>(plan.out_type), sequence * prefix.dim + column,
                      pooled[column] / norm);
      }
    }
    seen = prefix.dim;
  }
}

}  // namespace fastembed::pooling::cuda
