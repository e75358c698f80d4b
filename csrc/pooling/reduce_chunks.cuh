// Sums (or takes the maximum of) the valid tokens of one chunk of one sequence, over one tile of columns of one exit,
// into the workspace. Padding is skipped, not multiplied by zero.
#pragma once

#include <cstdint>

#include "common/device_dtype.cuh"
#include "pooling/plan.cuh"
#include "pooling/reductions.cuh"
#include "pooling/sequences.cuh"

namespace fastembed::pooling::cuda {

// Loads that a thread has in flight.
constexpr int tokens_in_flight = 4;
template <class T>
constexpr int tile_columns = warp_threads * vector_size<T>;

// Which columns of a tile a lane takes: neighbours when loads are vectors, else every 32nd, so that lanes are
// neighbours.
template <class T, bool vectorised>
__device__ int column_in_tile(int lane, int i) {
  return vectorised ? lane * vector_size<T> + i : i * warp_threads + lane;
}

// Reduces the tokens named by the bits of `valid`; load(token, values) reads this lane's columns of one.
// They count from `first_token`, a position in the sequence.
template <class Step, class T, class Load>
__device__ void reduce_tokens(unsigned valid, float first_weight, float weight_step, int64_t first_token, Load load,
                              typename Step::Value (&result)[vector_size<T>]) {
  while (valid != 0) {
    int tokens[tokens_in_flight];
    int taken = 0;
    T values[tokens_in_flight][vector_size<T>];
#pragma unroll
    for (int i = 0; i < tokens_in_flight; ++i) {
      // Past the last one, that one again: a load that costs nothing, and no branch between the loads.
      tokens[i] = valid != 0 ? __ffs(valid) - 1 : tokens[i - 1];
      taken += valid != 0;
      valid &= valid - 1;
    }
#pragma unroll
    for (int i = 0; i < tokens_in_flight; ++i) load(tokens[i], values[i]);
#pragma unroll
    for (int i = 0; i < tokens_in_flight; ++i) {
      if (i >= taken) break;
      const float weight = first_weight + weight_step * static_cast<float>(tokens[i]);
#pragma unroll
      for (int column = 0; column < vector_size<T>; ++column) {
        result[column] =
            Step::add(result[column], weight, device::to_float(values[i][column]), first_token + tokens[i]);
      }
    }
  }
}

__device__ inline void store_partial(const Plan& plan, int64_t index, float value) { plan.chunk_sums[index] = value; }

__device__ inline void store_partial(const Plan& plan, int64_t index, MaximumAndWinner::Value value) {
  plan.chunk_sums[index] = value.largest;
  plan.chunk_winners[index] = value.token;
}

// Grid: slots, tiles of columns, exits.
template <class T, class Step, bool vectorised>
__global__ void __launch_bounds__(chunk_tokens, Step::blocks) reduce_chunks(const __grid_constant__ Plan plan) {
  const DeviceExit& exit = plan.exits[blockIdx.z];
  const int first_column = blockIdx.y * tile_columns<T>;
  if (first_column >= exit.columns) return;
  using Value = typename Step::Value;
  const DeviceBatch& batch = plan.batch;
  const int lane = threadIdx.x % warp_threads;
  const int warp = threadIdx.x / warp_threads;

  const Span chunk = chunk_of_slot(batch, blockIdx.x);
  const int64_t first_token = chunk.begin + warp * warp_threads;
  const int64_t token = first_token + lane;
  const unsigned valid = __ballot_sync(full_warp, token < chunk.end && is_valid(batch, chunk.sequence, token));

  float first_weight = 1.0f;
  float weight_step = 0.0f;
  if (batch.mode == Mode::weightedmean) {
    const int64_t origin = first_valid_token(batch, whole_sequence(batch, chunk.sequence));
    first_weight = static_cast<float>(first_token - origin + 1);
    weight_step = 1.0f;
  }

  const T* const tokens = static_cast<const T*>(exit.data) + chunk.sequence * exit.sequence_stride +
                          first_token * exit.token_stride + first_column;
  const int columns = exit.columns - first_column;  // in this tile and those to its right
  const int64_t position = first_token - whole_sequence(batch, chunk.sequence).begin;
  Value result[vector_size<T>];
#pragma unroll
  for (int i = 0; i < vector_size<T>; ++i) result[i] = Step::identity();

  const int lane_column = lane * vector_size<T>;
  if (vectorised && lane_column + vector_size<T> <= columns) {
    const auto load_whole = [&](int index, T(&values)[vector_size<T>]) {
      device::load_vector(tokens + index * exit.token_stride + lane_column, values);
    };
    reduce_tokens<Step, T>(valid, first_weight, weight_step, position, load_whole, result);
  } else {
    const auto load_each = [&](int index, T(&values)[vector_size<T>]) {
#pragma unroll
      for (int i = 0; i < vector_size<T>; ++i) {
        const int column = column_in_tile<T, vectorised>(lane, i);
        if (column < columns) values[i] = tokens[index * exit.token_stride + column];
      }
    };
    if (column_in_tile<T, vectorised>(lane, 0) < columns) {
      reduce_tokens<Step, T>(valid, first_weight, weight_step, position, load_each, result);
    }
  }

  __shared__ alignas(16) Value of_warp[reduce_warps][tile_columns<T>];
#pragma unroll
  for (int i = 0; i < vector_size<T>; ++i) of_warp[warp][column_in_tile<T, vectorised>(lane, i)] = result[i];
  __syncthreads();
  const int64_t row = (blockIdx.z * plan.slots + blockIdx.x) * plan.columns + first_column;
  for (int column = threadIdx.x; column < tile_columns<T> && column < columns; column += chunk_tokens) {
    Value joined = of_warp[0][column];
#pragma unroll
    for (int other = 1; other < reduce_warps; ++other) joined = Step::combine(joined, of_warp[other][column]);
    store_partial(plan, row + column, joined);
  }
}

}  // namespace fastembed::pooling::cuda
