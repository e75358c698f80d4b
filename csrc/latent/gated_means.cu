// Averages over sequences of a feed-forward's gated hidden features: what is left of it once the product is made.
#include <stdexcept>
#include <string>

#include "common/device_dtype.cuh"
#include "common/device_reduce.cuh"
#include "common/launch_check.cuh"
#include "latent/latent_cuda.hpp"

namespace fastembed::latent::cuda {
namespace {

using device::warp_threads;

constexpr int warps = 8;
constexpr int threads = warps * warp_threads;

__device__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

__device__ int64_t offset(const Gated& gated, int64_t index) {
  return min(max(gated.offsets[index], int64_t{0}), gated.tokens);
}

// A lane has one feature, a warp every eighth token; the warps' sums are added in order. Grid: sequences by blocks of
// 32 features, the latter first.
template <class T>
__global__ void __launch_bounds__(threads) gated_means_of(const __grid_constant__ Gated gated) {
  __shared__ float of_warp[warps][warp_threads];
  const int lane = threadIdx.x % warp_threads;
  const int warp = threadIdx.x / warp_threads;
  const int64_t blocks = (gated.features + warp_threads - 1) / warp_threads;
  const int64_t sequence = blockIdx.x / blocks;
  const int64_t feature = blockIdx.x % blocks * warp_threads + lane;
  const int64_t begin = offset(gated, sequence);
  const int64_t end = offset(gated, sequence + 1);
  float sum = 0.0f;
  if (feature < gated.features) {
    const auto* const values = static_cast<const T*>(gated.values) + feature;
    const auto* const gates = static_cast<const T*>(gated.gates) + feature;
    const float value_bias = gated.value_bias[feature];
    const float gate_bias = gated.gate_bias[feature];
#pragma unroll 4
    for (int64_t token = begin + warp; token < end; token += warps) {
      const float value = device::to_float(values[token * gated.stride]) + value_bias;
      sum += value * gelu(device::to_float(gates[token * gated.stride]) + gate_bias);
    }
  }
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || feature >= gated.features) return;
  for (int other = 1; other < warps; ++other) sum += of_warp[other][lane];
  gated.means[sequence * gated.means_stride + feature] = end > begin ? sum / static_cast<float>(end - begin) : 0.0f;
}

}  // namespace

void gated_means(const Gated& gated, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t blocks = (gated.features + warp_threads - 1) / warp_threads * gated.sequences;
  if (blocks > INT32_MAX) {
    throw std::runtime_error("gated_means: " + std::to_string(gated.sequences) + " sequences of " +
                             std::to_string(gated.features) + " features are more than one launch takes");
  }
  const auto grid = static_cast<unsigned>(blocks);
  switch (gated.dtype) {
    case DType::f32:
      gated_means_of<float><<<grid, threads, 0, stream>>>(gated);
      break;
    case DType::bf16:
      gated_means_of<__nv_bfloat16><<<grid, threads, 0, stream>>>(gated);
      break;
    case DType::f16:
      throw std::runtime_error("gated_means: float16 is no dtype of folded weights");
  }
  fastembed::cuda::check_launch("gated_means_of");
}

}  // namespace fastembed::latent::cuda
