// Low-bit linear layers in two or three launches, for every width from one template: quantize_tokens, then few_tokens
// (and join_splits) or many_tokens, each in the header of its name.
//
// Codes are unsigned and activations signed bytes, multiplied with exact int32 sums; warp_tile.cuh has the mathematics
// of a group. Nothing is added atomically, and how a product is split depends on its shape alone, so that results
// repeat bit for bit, on every device.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/divide_up.hpp"
#include "common/launch_check.cuh"
#include "qmatmul/few_tokens.cuh"
#include "qmatmul/many_tokens.cuh"
#include "qmatmul/product.cuh"
#include "qmatmul/qmatmul_cuda.hpp"
#include "qmatmul/quantize_tokens.cuh"
#include "qmatmul/warp_tile.cuh"

namespace fastembed::qmatmul::cuda {
namespace {

// Two blocks for each of the 132 multiprocessors of the largest device aimed at; of no less than this many stages each.
constexpr int64_t blocks_wanted = 264;
constexpr int64_t fewest_stages = 8;

bool is_few(int64_t rows) { return rows <= most_few_tokens; }

int64_t splits_of(int64_t panels, int64_t stages) {
  return std::max<int64_t>(1, std::min(divide_up(blocks_wanted, panels), stages / fewest_stages));
}

// What stands where in the workspace.
struct Workspace {
  int64_t tiles;
  int64_t panels;
  int64_t stages;
  int64_t splits;
  int64_t scales_at;
  int64_t partials_at;
  int64_t bytes;

  Workspace(int64_t rows, int64_t in_features, int64_t out_features)
      : tiles(divide_up(rows, operand_tokens)),
        panels(divide_up(out_features, panel_width)),
        stages(divide_up(in_features, stage_features)),
        splits(is_few(rows) && panels > 0 ? splits_of(panels, stages) : 1),
        scales_at(stages * stage_fragments * tiles * fragment_bytes),
        partials_at(scales_at + tiles * operand_tokens * static_cast<int64_t>(sizeof(float))),
        bytes(partials_at) {
    if (splits > 1)
      bytes += splits * tiles * operand_tokens * panels * panel_width * static_cast<int64_t>(sizeof(float));
  }
};

bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <class T>
void launch_quantize(const Input& x, int64_t in_features, int64_t stages, const QuantizedTokens& to,
                     cudaStream_t stream) {
  const bool vectorised = x.stride % 4 == 0 && is_aligned(x.data, 4 * sizeof(T));
  const auto grid = static_cast<unsigned>(to.tiles * operand_tokens);
  quantize_tokens<T><<<grid, quantize_threads, 0, stream>>>(static_cast<const T*>(x.data), x.rows, x.stride,
                                                            in_features, stages * stage_features / 4, vectorised, to);
  fastembed::cuda::check_launch("quantize_tokens");
}

void allow_shared(const void* kernel, int bytes) {
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess) {
    fastembed::cuda::check_launch("qlinear");
  }
}

template <int bits, int token_operands>
void launch_few(const Product& product, int64_t splits, cudaStream_t stream) {
  constexpr int shared_bytes = FewShape<bits, token_operands>::shared_bytes;
  allow_shared(reinterpret_cast<const void*>(&few_tokens<bits, token_operands>), shared_bytes);
  const dim3 grid(static_cast<unsigned>(product.panels), static_cast<unsigned>(splits));
  few_tokens<bits, token_operands><<<grid, few_threads, shared_bytes, stream>>>(product);
  fastembed::cuda::check_launch("few_tokens");
}

template <int bits>
void launch_many(const Product& product, cudaStream_t stream) {
  constexpr int shared_bytes = ManyShape<bits>::shared_bytes;
  allow_shared(reinterpret_cast<const void*>(&many_tokens<bits>), shared_bytes);
  const dim3 grid(static_cast<unsigned>(divide_up(product.panels, many_panels)),
                  static_cast<unsigned>(divide_up(product.tokens.tiles, many_tiles)));
  many_tokens<bits><<<grid, many_threads, shared_bytes, stream>>>(product);
  fastembed::cuda::check_launch("many_tokens");
}

template <int bits>
void launch_products(const Product& product, int64_t splits, cudaStream_t stream) {
  if (!is_few(product.outputs.rows)) {
    launch_many<bits>(product, stream);
  } else if (product.tokens.tiles == 1) {
    launch_few<bits, 1>(product, splits, stream);
  } else {
    launch_few<bits, most_few_tokens / operand_tokens>(product, splits, stream);
  }
}

void launch_products(const Product& product, int bits, int64_t splits, cudaStream_t stream) {
  switch (bits) {
    case 1:
      return launch_products<1>(product, splits, stream);
    case 2:
      return launch_products<2>(product, splits, stream);
    case 3:
      return launch_products<3>(product, splits, stream);
    case 4:
      return launch_products<4>(product, splits, stream);
    case 5:
      return launch_products<5>(product, splits, stream);
    case 6:
      return launch_products<6>(product, splits, stream);
    case 7:
      return launch_products<7>(product, splits, stream);
    default:
      return launch_products<8>(product, splits, stream);
  }
}

Conversion conversion_of(const Layer& layer) {
  // Codes, stored zero points and activations are at most 255, 255 and 127 in size.
  const int64_t largest_sum = std::min(layer.group_size, layer.in_features) * 255 * 127;
  const bool half = layer.steps.kind == Zeros::midpoint && layer.bits == 1;
  return {largest_sum < 1 << 22 ? float_start : 0, static_cast<float>(1 << (layer.bits - 1)),
          layer.steps.kind == Zeros::codes, half || layer.steps.kind == Zeros::fractional};
}

}  // namespace

int64_t workspace_bytes(int64_t rows, int64_t in_features, int64_t out_features) {
  return Workspace(rows, in_features, out_features).bytes;
}

void qlinear(const Input& x, const Layer& layer, const void* residual, void* y, void* workspace, void* stream_handle) {
  if (x.rows == 0 || layer.out_features == 0) return;
  const Workspace parts(x.rows, layer.in_features, layer.out_features);
  if (parts.tiles * operand_tokens > INT32_MAX || divide_up(parts.tiles, many_tiles) > UINT16_MAX) {
    throw std::runtime_error("qlinear: " + std::to_string(x.rows) + " rows are more than one launch takes");
  }
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  auto* const memory = static_cast<uint8_t*>(workspace);
  const QuantizedTokens tokens{reinterpret_cast<TokenFragment*>(memory),
                               reinterpret_cast<float*>(memory + parts.scales_at), parts.tiles};
  switch (x.dtype) {
    case DType::f32:
      launch_quantize<float>(x, layer.in_features, parts.stages, tokens, stream);
      break;
    case DType::bf16:
      launch_quantize<__nv_bfloat16>(x, layer.in_features, parts.stages, tokens, stream);
      break;
    case DType::f16:
      launch_quantize<__half>(x, layer.in_features, parts.stages, tokens, stream);
      break;
  }

  const bool vectorised = layer.out_features % lane_features == 0 && is_aligned(y, vector_bytes) &&
                          is_aligned(residual, vector_bytes) && is_aligned(layer.bias, vector_bytes);
  Product product = {};
  product.codes = layer.codes;
  product.steps = layer.steps;
  product.midpoint = layer.bits == 1 ? 0.5f : static_cast<float>(1 << (layer.bits - 1));
  product.conversion = conversion_of(layer);
  product.panels = parts.panels;
  product.panel_bytes = divide_up(layer.in_features, quad) * 32 * layer.bits;
  product.groups = divide_up(layer.in_features, layer.group_size);
  product.group_blocks = layer.group_size / block_features;
  product.blocks = divide_up(layer.in_features, block_features);
  product.stages = parts.stages;
  product.tokens = tokens;
  product.outputs = {y,          residual, layer.bias,        tokens.scales, x.dtype, layer.bias_dtype, layer.epilogue,
                     vectorised, x.rows,   layer.out_features};
  product.partials = reinterpret_cast<float*>(memory + parts.partials_at);
  launch_products(product, layer.bits, parts.splits, stream);
  if (parts.splits > 1) {
    const int64_t threads = x.rows * parts.panels * (panel_width / lane_features);
    const auto grid = static_cast<unsigned>(divide_up(threads, join_threads));
    join_splits<<<grid, join_threads, 0, stream>>>(product, static_cast<int>(parts.splits));
    fastembed::cuda::check_launch("join_splits");
  }
}

}  // namespace fastembed::qmatmul::cuda
