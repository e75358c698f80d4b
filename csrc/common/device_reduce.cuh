// Reductions over a warp and over a block, in an order that depends on nothing but the block's shape.
#pragma once

namespace fastembed::device {

constexpr unsigned full_warp = 0xffffffffu;
constexpr int warp_threads = 32;

// The combination of all lanes' values, in every lane. All 32 lanes must call it.
template <class T, class Combine>
__device__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int lanes = warp_threads / 2; lanes > 0; lanes /= 2) {
    value = combine(value, __shfl_xor_sync(full_warp, value, lanes));
  }
  return value;
}

// The combination of all threads' values, in every thread. All `threads` threads of the one-dimensional block must call
// it; may be called again at once.
template <int threads, class T, class Combine>
__device__ T block_reduce(T value, T identity, Combine combine) {
  static_assert(threads % warp_threads == 0 && threads <= warp_threads * warp_threads);
  constexpr int warps = threads / warp_threads;
  __shared__ T of_warp[warps];
  const int lane = threadIdx.x % warp_threads;
  value = warp_reduce(value, combine);
  if (lane == 0) of_warp[threadIdx.x / warp_threads] = value;
  __syncthreads();
  value = warp_reduce(lane < warps ? of_warp[lane] : identity, combine);
  __syncthreads();
  return value;
}

}  // namespace fastembed::device
