// More than 32 tokens: bound by the products, so blocks of 128 outputs by 128 tokens, whose weights are spread to bytes
// once, in shared memory, while the stage before is multiplied.
#pragma once

#include <cstdint>

#include "common/async_copy.cuh"
#include "qmatmul/product.cuh"
#include "qmatmul/warp_tile.cuh"
#include "qmatmul/write_outputs.cuh"

namespace fastembed::qmatmul::cuda {

constexpr int many_panels = 2;
constexpr int many_operands = 4;  // of 8 tokens, per warp
constexpr int many_warps = 8;
constexpr int many_threads = many_warps * warp_threads;
constexpr int many_tiles = many_warps / many_panels * many_operands;

template <int bits>
struct ManyShape {
  static constexpr int packed_bytes = many_panels * stage_bytes<bits>;
  static constexpr int token_bytes = stage_fragments * many_tiles * fragment_bytes;
  static constexpr int spread_bytes = many_panels * stage_blocks * operands * fragment_bytes;
  // Codes are needed while they are spread, tokens until the stage has been multiplied.
  static constexpr int packed_buffers = 2;
  static constexpr int token_buffers = 3;
  static constexpr int spread_buffers = 2;
  static constexpr int tokens_at = packed_buffers * packed_bytes;
  static constexpr int spread_at = tokens_at + token_buffers * token_bytes;
  static constexpr int shared_bytes = spread_at + spread_buffers * spread_bytes;
};

// Grid: pairs of panels, tiles of 128 tokens. A warp multiplies one panel by 32 tokens, and spreads the codes of one
// panel for 16 input features of a stage.
template <int bits>
__global__ void __launch_bounds__(many_threads) many_tokens(const __grid_constant__ Product product) {
  using Shape = ManyShape<bits>;
  extern __shared__ __align__(16) uint8_t shared[];
  const int warp = threadIdx.x / warp_threads;
  const int lane = lane_index();
  const int64_t first_panel = static_cast<int64_t>(blockIdx.x) * many_panels;
  const int64_t first_tile = static_cast<int64_t>(blockIdx.y) * many_tiles;
  const int panel_of_block = warp % many_panels;
  const int tile_of_block = warp / many_panels * many_operands;
  const int64_t panel = first_panel + panel_of_block;
  const bool works = panel < product.panels && first_tile + tile_of_block < product.tokens.tiles;

  const auto start_stage = [&](int64_t stage) {
    if (stage < product.stages) {
      uint8_t* const packed = shared + stage % Shape::packed_buffers * Shape::packed_bytes;
      for (int offset = threadIdx.x * vector_bytes; offset < Shape::packed_bytes;
           offset += many_threads * vector_bytes) {
        copy_codes(packed + offset, product, first_panel + offset / stage_bytes<bits>,
                   stage * stage_bytes<bits> + offset % stage_bytes<bits>);
      }
      uint8_t* const tokens = shared + Shape::tokens_at + stage % Shape::token_buffers * Shape::token_bytes;
#pragma unroll
      for (int offset = threadIdx.x * vector_bytes; offset < Shape::token_bytes;
           offset += many_threads * vector_bytes) {
        copy_tokens(tokens, product.tokens, stage, first_tile, many_tiles, offset);
      }
    }
    device::commit_copies();
  };

  // [panels, blocks of 16 input features, operands, lanes] of the two registers that a block fills.
  const auto spread_codes_of = [&](int64_t stage) {
    return reinterpret_cast<uint2*>(shared + Shape::spread_at + stage % Shape::spread_buffers * Shape::spread_bytes);
  };
  const auto spread_stage = [&](int64_t stage) {
    if (stage >= product.stages) return;
    const uint8_t* const packed = shared + stage % Shape::packed_buffers * Shape::packed_bytes;
    const int block = warp / many_panels;
    uint32_t words[bits];
    uint32_t bytes[8];
    load_codes<bits>(packed + panel_of_block * stage_bytes<bits>, 4 * block + lane % 4, words);
    spread<bits>(words, bytes);
    uint2* const target = spread_codes_of(stage) + (panel_of_block * stage_blocks + block) * operands * warp_threads;
#pragma unroll
    for (int m = 0; m < operands; ++m) target[m * warp_threads + lane] = make_uint2(bytes[2 * m], bytes[2 * m + 1]);
  };

  WarpTile<many_operands> tile;
  tile.clear(product.conversion);
  Groups groups(product, panel, 0, works ? product.blocks : 0);
  start_stage(0);
  start_stage(1);
  device::wait_for_copies<1>();
  __syncthreads();
  spread_stage(0);
#pragma unroll 1
  for (int64_t stage = 0; stage < product.stages; ++stage) {
    device::wait_for_copies<0>();
    __syncthreads();  // the codes of this stage are spread, those of the next have come, the one before is multiplied
    start_stage(stage + 2);
    spread_stage(stage + 1);
    if (!works) continue;
    const uint2* const spread_codes = spread_codes_of(stage) + panel_of_block * stage_blocks * operands * warp_threads;
    const auto* const fragments = reinterpret_cast<const TokenFragment*>(
        shared + Shape::tokens_at + stage % Shape::token_buffers * Shape::token_bytes);
#pragma unroll
    for (int step = 0; step < stage_fragments; ++step) {
      uint32_t weights[operands][4];
#pragma unroll
      for (int m = 0; m < operands; ++m) {
        const uint2 low = spread_codes[(2 * step * operands + m) * warp_threads + lane];
        const uint2 high = spread_codes[((2 * step + 1) * operands + m) * warp_threads + lane];
        weights[m][0] = low.x;
        weights[m][1] = low.y;
        weights[m][2] = high.x;
        weights[m][3] = high.y;
      }
      uint32_t tokens[many_operands][2];
#pragma unroll
      for (int n = 0; n < many_operands; ++n) {
        const TokenFragment fragment = fragments[(step * many_tiles + tile_of_block + n) * warp_threads + lane];
        tokens[n][0] = fragment.x;
        tokens[n][1] = fragment.y;
      }
      groups.multiply(tile, weights, tokens);
    }
  }
  device::wait_for_copies<0>();
  if (!works) return;
#pragma unroll
  for (int n = 0; n < many_operands; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float totals[lane_features];
      tile.outputs(n, j, totals);
      write_outputs(product.outputs, (first_tile + tile_of_block + n) * operand_tokens + lane % 4 * 2 + j,
                    panel * panel_width + lane / 4 * lane_features, totals);
    }
  }
}

}  // namespace fastembed::qmatmul::cuda
