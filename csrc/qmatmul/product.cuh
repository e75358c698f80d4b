// What few_tokens and many_tokens share: their parameters, the groups that a warp passes on its way through the input
// features, and the copies to shared memory.
#pragma once

#include <cstdint>

#include "common/async_copy.cuh"
#include "common/device_dtype.cuh"
#include "qmatmul/quantize_tokens.cuh"
#include "qmatmul/warp_tile.cuh"
#include "qmatmul/write_outputs.cuh"

namespace fastembed::qmatmul::cuda {

constexpr int stage_blocks = stage_features / block_features;

// The parameters of the multiplying kernels.
struct Product {
  const uint8_t* codes;
  Steps steps;
  float midpoint;
  Conversion conversion;
  int64_t panels;
  int64_t panel_bytes;
  int64_t groups;
  int64_t group_blocks;
  int64_t blocks;  // of 16 input features
  int64_t stages;
  QuantizedTokens tokens;
  Outputs outputs;
  float* partials;  // [splits, tiles * 8, panels * 64]
};

// The groups that a warp passes on its way through blocks [first, end) of one panel.
class Groups {
 public:
  __device__ Groups(const Product& product, int64_t panel, int64_t first, int64_t end)
      : product_(product),
        group_(panel * product.groups + first / product.group_blocks),
        blocks_left_(end - first),
        group_left_(product.group_blocks - first % product.group_blocks),
        parts_(product.group_blocks % 2 == 0 ? 1 : 2) {
    if (blocks_left_ > 0) steps_ = load_steps(product.steps, product.midpoint, group_);
  }

  // Multiplies the next two blocks, one by one where a group can end between them.
  template <int token_operands>
  __device__ void multiply(WarpTile<token_operands>& tile, const uint32_t (&weights)[operands][4],
                           const uint32_t (&tokens)[token_operands][2]) {
#pragma unroll 1
    for (int part = 0; part < parts_ && blocks_left_ > 0; ++part) {
      uint32_t of_part[token_operands][2];
#pragma unroll
      for (int n = 0; n < token_operands; ++n) {
        of_part[n][0] = part == 0 ? tokens[n][0] : 0;
        of_part[n][1] = part == parts_ - 1 ? tokens[n][1] : 0;
      }
      tile.multiply(weights, of_part);
      blocks_left_ -= 2 / parts_;
      group_left_ -= 2 / parts_;
      if (blocks_left_ > 0 && group_left_ > 0) continue;
      tile.finish_group(steps_, product_.conversion);
      if (blocks_left_ <= 0) break;
      group_left_ = product_.group_blocks;
      steps_ = load_steps(product_.steps, product_.midpoint, ++group_);
    }
  }

 private:
  const Product& product_;
  int64_t group_;
  int64_t blocks_left_;
  int64_t group_left_;
  int parts_;
  GroupSteps steps_;
};

// Starts copying 16 bytes of a panel's codes, `offset` bytes into them; zeros past their end.
__device__ inline void copy_codes(void* target, const Product& product, int64_t panel, int64_t offset) {
  const bool inside = panel < product.panels && offset < product.panel_bytes;
  device::copy_async<vector_bytes>(target, product.codes + (inside ? panel * product.panel_bytes + offset : 0),
                                   inside ? vector_bytes : 0);
}

// Starts copying 16 bytes of the activations of `count` tiles from `first_tile` on, `offset` bytes into the part of
// shared memory that holds them for a stage; zeros past the last tile.
__device__ inline void copy_tokens(uint8_t* target, const QuantizedTokens& tokens, int64_t stage, int64_t first_tile,
                                   int count, int offset) {
  const int fragment = offset / (count * fragment_bytes);
  const int64_t tile = first_tile + offset / fragment_bytes % count;
  const bool inside = tile < tokens.tiles;
  const int64_t index = (stage * stage_fragments + fragment) * tokens.tiles + (inside ? tile : 0);
  device::copy_async<vector_bytes>(
      target + offset,
      reinterpret_cast<const uint8_t*>(tokens.fragments + index * warp_threads) + offset % fragment_bytes,
      inside ? vector_bytes : 0);
}

}  // namespace fastembed::qmatmul::cuda
