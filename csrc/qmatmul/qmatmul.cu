// Low-bit linear layers in two or three launches, for every width from one template:
//
//   quantize_tokens  one block per token: its scale, and its int8 codes in the order in which a lane of mma takes them.
//   few_tokens       up to 32 tokens: bound by the reading of the weights, which are streamed once, each warp taking
//   input
//                    features of its own; panels are split over blocks until the device has enough of them.
//   join_splits      adds what the blocks of a panel found, in their order.
//   many_tokens      more tokens: bound by the products, so blocks of 128 outputs by 128 tokens, whose weights are
//   spread
//                    to bytes once, in shared memory, while the stage before is multiplied.
//
// Codes are unsigned and activations signed bytes, multiplied with exact int32 sums; warp_tile.cuh has the mathematics
// of a group. Nothing is added atomically, and how a product is split depends on its shape alone, so that results
// repeat bit for bit, on every device.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "common/async_copy.cuh"
#include "common/divide_up.hpp"
#include "common/launch_check.cuh"
#include "qmatmul/qmatmul_cuda.hpp"
#include "qmatmul/warp_tile.cuh"

namespace fastembed::qmatmul::cuda {
namespace {

using device::vector_bytes;
using device::warp_threads;

constexpr int quantize_threads = 128;

constexpr int few_warps = 4;
constexpr int few_threads = few_warps * warp_threads;
constexpr int most_few_tokens = 32;
constexpr int few_buffers = 3;
// Two blocks for each of the 132 multiprocessors of the largest device aimed at; of no less than this many stages each.
constexpr int64_t blocks_wanted = 264;
constexpr int64_t fewest_stages = 8;

constexpr int many_panels = 2;
constexpr int many_operands = 4;  // of 8 tokens, per warp
constexpr int many_warps = 8;
constexpr int many_threads = many_warps * warp_threads;
constexpr int many_tiles = many_warps / many_panels * many_operands;
constexpr int stage_blocks = stage_features / block_features;

// int8 activations of 8 tokens for 32 input features, as the lanes of a warp hold them.
using TokenFragment = uint2;
constexpr int fragment_features = 32;
constexpr int stage_fragments = stage_features / fragment_features;
constexpr int fragment_bytes = warp_threads * static_cast<int>(sizeof(TokenFragment));

struct QuantizedTokens {
  TokenFragment* fragments;  // [stages * 2, tiles, 32]
  float* scales;             // [tiles * 8]
  int64_t tiles;             // of 8 tokens
};

struct Outputs {
  void* data;
  const void* residual;
  const void* bias;
  const float* token_scales;
  DType dtype;
  DType bias_dtype;
  Epilogue epilogue;
  bool vectorised;
  int64_t rows;
  int64_t columns;
};

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

// --- activations

// Input features 4 quad .. of a token, zeros past its end.
template <class T>
__device__ void load_quad(const T* token, int64_t quad, int64_t in_features, bool vectorised, float (&x)[4]) {
  struct alignas(4 * sizeof(T)) Vector {
    T elements[4];
  };
  const int64_t first = 4 * quad;
  if (vectorised && first + 4 <= in_features) {
    const Vector vector = *reinterpret_cast<const Vector*>(token + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = device::to_float(vector.elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = first + i < in_features ? device::to_float(token[first + i]) : 0.0f;
  }
}

// Grid: tokens, rounded up to 8. Those past the end become zeros.
template <class T>
__global__ void __launch_bounds__(quantize_threads)
    quantize_tokens(const T* x, int64_t rows, int64_t stride, int64_t in_features, int64_t quads, bool vectorised,
                    QuantizedTokens to) {
  const int64_t token = blockIdx.x;
  const T* const row = x + token * stride;
  const int64_t read_quads = token < rows ? (in_features + 3) / 4 : 0;

  // The bits of magnitudes are ordered as the magnitudes are, infinity and NaN last.
  unsigned largest = __float_as_uint(smallest_amax);
  for (int64_t quad = threadIdx.x; quad < read_quads; quad += quantize_threads) {
    float values[4];
    load_quad(row, quad, in_features, vectorised, values);
#pragma unroll
    for (const float value : values) largest = max(largest, __float_as_uint(fabsf(value)));
  }
  largest = device::block_reduce<quantize_threads>(largest, 0u, [](unsigned a, unsigned b) { return max(a, b); });
  const bool finite = largest < __float_as_uint(INFINITY);
  const float amax = __uint_as_float(largest);
  const float inverse = 127.0f / amax;
  if (threadIdx.x == 0) to.scales[token] = finite ? amax * (1.0f / 127.0f) : __uint_as_float(0x7fc00000u);

  auto* const words = reinterpret_cast<uint32_t*>(to.fragments);
  for (int64_t quad = threadIdx.x; quad < quads; quad += quantize_threads) {
    uint32_t word = 0;
    if (finite && quad < read_quads) {
      float values[4];
      load_quad(row, quad, in_features, vectorised, values);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        word |= static_cast<uint32_t>(static_cast<int>(rintf(values[i] * inverse)) & 0xff) << 8 * i;
      }
    }
    const int64_t fragment = quad / 8 * to.tiles + token / operand_tokens;
    const int64_t lane = token % operand_tokens * 4 + quad % 4;
    words[(fragment * warp_threads + lane) * 2 + quad / 4 % 2] = word;
  }
}

// --- outputs

__device__ float apply_epilogue(float y, Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::none:
      return y;
    case Epilogue::gelu:
      return 0.5f * y * (1.0f + erff(y * 0.70710678f));
    case Epilogue::gelu_tanh:
      return 0.5f * y * (1.0f + tanhf(0.79788456f * (y + 0.044715f * y * y * y)));
    case Epilogue::relu:
      return y < 0.0f ? 0.0f : y;  // a NaN stays
    case Epilogue::silu:
      return y / (1.0f + expf(-y));
  }
  return y;
}

__device__ void load_outputs(const void* data, DType dtype, int64_t index, int count, bool vectorised,
                             float (&values)[lane_features]) {
  if (vectorised) {
    device::load_eight(data, dtype, index, values);
  } else {
#pragma unroll
    for (int i = 0; i < lane_features; ++i) values[i] = i < count ? device::load(data, dtype, index + i) : 0.0f;
  }
}

// Eight output features of a token, from the sums over its groups.
__device__ void write_outputs(const Outputs& to, int64_t token, int64_t feature, const float (&totals)[lane_features]) {
  if (token >= to.rows || feature >= to.columns) return;
  const int64_t index = token * to.columns + feature;
  const int count = static_cast<int>(min(to.columns - feature, int64_t{lane_features}));
  float bias[lane_features] = {};
  float residual[lane_features] = {};
  if (to.bias != nullptr) load_outputs(to.bias, to.bias_dtype, feature, count, to.vectorised, bias);
  if (to.residual != nullptr) load_outputs(to.residual, to.dtype, index, count, to.vectorised, residual);
  const float scale = to.token_scales[token];
  float y[lane_features];
#pragma unroll
  for (int i = 0; i < lane_features; ++i) {
    y[i] = apply_epilogue(totals[i] * scale + bias[i], to.epilogue) + residual[i];
  }
  if (to.vectorised) {
    device::store_eight(to.data, to.dtype, index, y);
  } else {
#pragma unroll
    for (int i = 0; i < lane_features; ++i) {
      if (i < count) device::store(to.data, to.dtype, index + i, y[i]);
    }
  }
}

// --- products

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
__device__ void copy_codes(void* target, const Product& product, int64_t panel, int64_t offset) {
  const bool inside = panel < product.panels && offset < product.panel_bytes;
  device::copy_async<vector_bytes>(target, product.codes + (inside ? panel * product.panel_bytes + offset : 0),
                                   inside ? vector_bytes : 0);
}

// Starts copying 16 bytes of the activations of `count` tiles from `first_tile` on, `offset` bytes into the part of
// shared memory that holds them for a stage; zeros past the last tile.
__device__ void copy_tokens(uint8_t* target, const QuantizedTokens& tokens, int64_t stage, int64_t first_tile,
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
__global__ void __launch_bounds__(quantize_threads) join_splits(const __grid_constant__ Product product, int splits) {
  const int64_t chunks = product.panels * (panel_width / lane_features);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * quantize_threads + threadIdx.x;
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

// --- launches

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
    const auto grid = static_cast<unsigned>(divide_up(threads, quantize_threads));
    join_splits<<<grid, quantize_threads, 0, stream>>>(product, static_cast<int>(parts.splits));
    fastembed::cuda::check_launch("join_splits");
  }
}

}  // namespace fastembed::qmatmul::cuda
