// Up to 32 tokens: bound by the reading of the weights, which are streamed once, each warp taking input features of its
// own. Panels are split over blocks until the device has enough of them; then join_splits adds what the blocks of a
// panel found, in their order.
#pragma once

#include <cstdint>

#include "common/async_copy.cuh"
#include "common/device_dtype.cuh"
#include "qmatmul/product.cuh"
#include "qmatmul/warp_tile.cuh"
#include "qmatmul/write_outputs.cuh"

namespace fastembed::qmatmul::cuda {

constexpr int few_warps = 4;
constexpr int few_threads = few_warps * warp_threads;
constexpr int most_few_tokens = 32;
constexpr int few_buffers = 3;
constexpr int join_threads = 128;

template <int bits, int token_operands>
struct FewShape {
  static constexpr int token_bytes = stage_fragments * token_operands * fragment_bytes;
  static constexpr int buffer_bytes = stage_bytes<bits> + token_bytes;
  static constexpr int ring_bytes = few_warps * few_buffers * buffer_bytes;
  static constexpr int tokens = token_operands * operand_tokens;
  static constexpr int sums_bytes = few_warps * tokens * static_cast<int>(panel_width * sizeof(float));
  static constexpr int shared_bytes = ring_bytes > sums_bytes ? ring_bytes : sums_bytes;
};

// Grid: panels, splits. Each warp streams its own part of the panel through buffers of its own, and needs no barrier.
template <int bits, int token_operands>
__global__ void __launch_bounds__(few_threads) few_tokens(const __grid_constant__ Product product) {
  using Shape = FewShape<bits, token_operands>;
  extern __shared__ __align__(16) uint8_t shared[];
  const int64_t panel = blockIdx.x;
  const int warp = threadIdx.x / warp_threads;
  const int lane = lane_index();

  const int64_t part = blockIdx.y * few_warps + warp;
  const int64_t parts = static_cast<int64_t>(gridDim.y) * few_warps;
  const int64_t first = product.stages * part / parts;
  const int64_t end = product.stages * (part + 1) / parts;
  uint8_t* const ring = shared + warp * few_buffers * Shape::buffer_bytes;

  const auto start_stage = [&](int64_t stage) {
    if (stage < end) {
      uint8_t* const buffer = ring + (stage - first) % few_buffers * Shape::buffer_bytes;
#pragma unroll
      for (int offset = lane * vector_bytes; offset < stage_bytes<bits>; offset += warp_threads * vector_bytes) {
        copy_codes(buffer + offset, product, panel, stage * stage_bytes<bits> + offset);
      }
#pragma unroll
      for (int offset = lane * vector_bytes; offset < Shape::token_bytes; offset += warp_threads * vector_bytes) {
        copy_tokens(buffer + stage_bytes<bits>, product.tokens, stage, 0, token_operands, offset);
      }
    }
    device::commit_copies();
  };

  WarpTile<token_operands> tile;
  tile.clear(product.conversion);
  Groups groups(product, panel, first * stage_blocks, min(end * stage_blocks, product.blocks));
#pragma unroll
  for (int ahead = 0; ahead < few_buffers - 1; ++ahead) start_stage(first + ahead);
#pragma unroll 1
  for (int64_t stage = first; stage < end; ++stage) {
    device::wait_for_copies<few_buffers - 2>();
    __syncwarp();  // and every lane is done with the buffer that is filled next
    start_stage(stage + few_buffers - 1);
    const uint8_t* const buffer = ring + (stage - first) % few_buffers * Shape::buffer_bytes;
    const auto* const fragments = reinterpret_cast<const TokenFragment*>(buffer + stage_bytes<bits>);
#pragma unroll
    for (int step = 0; step < stage_fragments; ++step) {
      uint32_t weights[operands][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[bits];
        uint32_t bytes[8];
        load_codes<bits>(buffer, 8 * step + 4 * half + lane % 4, words);
        spread<bits>(words, bytes);
#pragma unroll
        for (int m = 0; m < operands; ++m) {
          weights[m][2 * half] = bytes[2 * m];
          weights[m][2 * half + 1] = bytes[2 * m + 1];
        }
      }
      uint32_t tokens[token_operands][2];
#pragma unroll
      for (int n = 0; n < token_operands; ++n) {
        const TokenFragment fragment = fragments[(step * token_operands + n) * warp_threads + lane];
        tokens[n][0] = fragment.x;
        tokens[n][1] = fragment.y;
      }
      groups.multiply(tile, weights, tokens);
    }
  }
  device::wait_for_copies<0>();
  __syncthreads();  // the buffers become the warps' sums

  auto* const sums = reinterpret_cast<float*>(shared);  // [warps, tokens, 64]
#pragma unroll
  for (int n = 0; n < token_operands; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float values[lane_features];
      tile.outputs(n, j, values);
      const int token = n * operand_tokens + lane % 4 * 2 + j;
      device::store_eight(sums, DType::f32, (warp * Shape::tokens + token) * panel_width + lane / 4 * lane_features,
                          values);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < Shape::tokens * (panel_width / lane_features); i += few_threads) {
    const int64_t token = i / (panel_width / lane_features);
    const int column = i % (panel_width / lane_features) * lane_features;
    if (token >= product.outputs.rows) continue;
    float total[lane_features];
    device::load_eight(sums, DType::f32, token * panel_width + column, total);
#pragma unroll
    for (int other = 1; other < few_warps; ++other) {
      float more[lane_features];
      device::load_eight(sums, DType::f32, (other * Shape::tokens + token) * panel_width + column, more);
#pragma unroll
      for (int k = 0; k < lane_features; ++k) total[k] += more[k];
    }
    const int64_t feature = panel * panel_width + column;
    if (gridDim.y == 1) {
      write_outputs(product.outputs, token, feature, total);
    } else {
      const int64_t row = blockIdx.y * product.tokens.tiles * operand_tokens + token;
      device::store_eight(product.partials, DType::f32, row * product.panels * panel_width + feature, total);
    }
  }
}

// Grid: blocks of threads, one for eight output features of a token.
static __global__ void __launch_bounds__(join_threads)
    join_splits(const __grid_constant__ Product product, int splits) {
  const int64_t chunks = product.panels * (panel_width / lane_features);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * join_threads + threadIdx.x;
  const int64_t token = index / chunks;
  if (token >= product.outputs.rows) return;
  const int64_t feature = index % chunks * lane_features;
  float total[lane_features] = {};
  for (int split = 0; split < splits; ++split) {
    const int64_t row = split * product.tokens.tiles * operand_tokens + token;
    float more[lane_features];
    device::load_eight(product.partials, DType::f32, row * product.panels * panel_width + feature, more);
#pragma unroll
    for (int i = 0; i < lane_features; ++i) total[i] += more[i];
  }
  write_outputs(product.outputs, token, feature, total);
}

}  // namespace fastembed::qmatmul::cuda
