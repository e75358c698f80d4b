// Multi-exit pooling: two launches for up to 16 exits with all their dims, one for the modes that pick a token.
//
//   reduce_chunks  sums (or takes the maximum of) the valid tokens of one chunk of one sequence, over one tile of
//   columns
//                  of one exit, into the workspace. Padding is skipped, not multiplied by zero.
//   finish_rows    joins the chunks of a sequence, divides, and writes every normalised prefix of the pooled vector
//   from
//                  one running sum of squares.
//
// Nothing is added atomically and a chunk has a fixed length, so that a row's result depends neither on scheduling nor
// on the rest of the batch. Packed sequences are found on the device, from the number of tokens and sequences alone: a
// grid slot per chunk, of which a sequence that starts at token s owns those from s / chunk_tokens + its own number on;
// it can never need more than there are before the next sequence's.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <stdexcept>
#include <string>

#include "common/device_dtype.cuh"
#include "common/device_reduce.cuh"
#include "common/launch_check.cuh"
#include "pooling/pooling_cuda.hpp"

namespace fastembed::pooling::cuda {
namespace {

using device::full_warp;
using device::vector_size;
using device::warp_threads;

// Each warp of reduce_chunks takes 32 tokens, whose mask fits one ballot.
constexpr int reduce_warps = 4;
constexpr int chunk_tokens = reduce_warps * warp_threads;
// Blocks per multiprocessor that registers are allotted for.
constexpr int reduce_blocks = 4;
// Loads that a thread has in flight.
constexpr int tokens_in_flight = 4;
template <class T>
constexpr int tile_columns = warp_threads * vector_size<T>;

constexpr int finish_threads = 256;
constexpr float norm_eps = 1e-12f;

constexpr int most_exits = 16;
constexpr int most_prefixes = 128;

struct DeviceExit {
  const void* data;
  int64_t sequence_stride;
  int64_t token_stride;
  int columns;  // that any prefix needs
  int first_prefix;
  int prefixes;
};

struct DevicePrefix {
  void* data;
  int dim;
};

// The parameters of both kernels. Prefixes rise in dim within an exit.
struct Plan {
  DeviceExit exits[most_exits];
  DevicePrefix prefixes[most_prefixes];
  int64_t sequences;
  int64_t tokens;
  Mask mask;        // data is null without a mask
  Offsets offsets;  // data is null when padded
  Mode mode;
  DType dtype;
  DType out_dtype;
  bool normalize;
  int64_t slots;          // chunks in the grid
  int64_t columns;        // row length of the two arrays below
  float* chunk_sums;      // [exits, slots, columns]
  float* pooled_vectors;  // [exits, sequences, columns]
};
static_assert(sizeof(Plan) <= 4096, "kernel parameters");

__host__ __device__ constexpr int64_t chunks_of(int64_t tokens) { return (tokens + chunk_tokens - 1) / chunk_tokens; }

int64_t slot_count(const Batch& batch) {
  if (batch.offsets == nullptr) return batch.sequences * chunks_of(batch.tokens);
  return batch.tokens / chunk_tokens + batch.sequences;
}

// --- which tokens
// -----------------------------------------------------------------------------------------------------

// Tokens [begin, end) of a sequence: positions in its row of the batch, or in the packed tensor.
struct Span {
  int64_t sequence;
  int64_t begin;
  int64_t end;
};

__device__ int64_t offset(const Plan& plan, int64_t index) {
  const int64_t position = index * plan.offsets.stride;
  const int64_t value = plan.offsets.is_int64 ? static_cast<const int64_t*>(plan.offsets.data)[position]
                                              : static_cast<const int32_t*>(plan.offsets.data)[position];
  return value < 0 ? 0 : value < plan.tokens ? value : plan.tokens;
}

__device__ Span whole_sequence(const Plan& plan, int64_t sequence) {
  if (plan.offsets.data == nullptr) return {sequence, 0, plan.tokens};
  return {sequence, offset(plan, sequence), offset(plan, sequence + 1)};
}

__device__ int64_t first_slot(const Plan& plan, int64_t sequence) {
  if (plan.offsets.data == nullptr) return sequence * chunks_of(plan.tokens);
  return offset(plan, sequence) / chunk_tokens + sequence;
}

// The chunk that a slot stands for; empty for the slots that a sequence leaves over.
__device__ Span chunk_of_slot(const Plan& plan, int64_t slot) {
  int64_t sequence = 0;
  for (int64_t end = plan.sequences; end - sequence > 1;) {
    const int64_t middle = (sequence + end) / 2;
    if (first_slot(plan, middle) <= slot) {
      sequence = middle;
    } else {
      end = middle;
    }
  }
  const Span whole = whole_sequence(plan, sequence);
  const int64_t chunk = slot - first_slot(plan, sequence);
  if (chunk < 0) return {sequence, whole.begin, whole.begin};
  const int64_t begin = whole.begin + chunk * chunk_tokens;
  return {sequence, begin, begin + chunk_tokens < whole.end ? begin + chunk_tokens : whole.end};
}

__device__ bool is_valid(const Plan& plan, int64_t sequence, int64_t token) {
  const Mask& mask = plan.mask;
  if (mask.data == nullptr) return true;
  const int64_t position = sequence * mask.sequence_stride + token * mask.token_stride;
  uint64_t bits = 0;
  switch (mask.element_size) {
    case 1:
      bits = static_cast<const uint8_t*>(mask.data)[position];
      break;
    case 2:
      bits = static_cast<const uint16_t*>(mask.data)[position];
      break;
    case 4:
      bits = static_cast<const uint32_t*>(mask.data)[position];
      break;
    default:
      bits = static_cast<const uint64_t*>(mask.data)[position];
  }
  return bits != 0 && bits != mask.negative_zero;
}

// The first valid token of a sequence, or its end; found by a whole warp.
__device__ int64_t first_valid_token(const Plan& plan, const Span& whole) {
  if (plan.mask.data == nullptr) return whole.begin;
  for (int64_t begin = whole.begin; begin < whole.end; begin += warp_threads) {
    const int64_t token = begin + threadIdx.x % warp_threads;
    const unsigned valid = __ballot_sync(full_warp, token < whole.end && is_valid(plan, whole.sequence, token));
    if (valid != 0) return begin + __ffs(valid) - 1;
  }
  return whole.end;
}

// --- reduce_chunks
// ----------------------------------------------------------------------------------------------------

struct WeightedSum {
  static constexpr float identity = 0.0f;
  __device__ static float combine(float a, float b) { return a + b; }
  __device__ static float add(float sum, float weight, float x) { return fmaf(weight, x, sum); }
};

// NaN once a NaN was seen.
struct Maximum {
  static constexpr float identity = -INFINITY;
  __device__ static float combine(float a, float b) { return b > a || b != b ? b : a; }
  __device__ static float add(float largest, float, float x) { return combine(largest, x); }
};

// Which columns of a tile a lane takes: neighbours when loads are vectors, else every 32nd, so that lanes are
// neighbours.
template <class T, bool vectorised>
__device__ int column_in_tile(int lane, int i) {
  return vectorised ? lane * vector_size<T> + i : i * warp_threads + lane;
}

// Reduces the tokens named by the bits of `valid`; load(token, values) reads this lane's columns of one.
template <class Step, class T, class Load>
__device__ void reduce_tokens(unsigned valid, float first_weight, float weight_step, Load load,
                              float (&result)[vector_size<T>]) {
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
        result[column] = Step::add(result[column], weight, device::to_float(values[i][column]));
      }
    }
  }
}

// Grid: slots, tiles of columns, exits.
template <class T, class Step, bool vectorised>
__global__ void __launch_bounds__(chunk_tokens, reduce_blocks) reduce_chunks(const __grid_constant__ Plan plan) {
  const DeviceExit& exit = plan.exits[blockIdx.z];
  const int first_column = blockIdx.y * tile_columns<T>;
  if (first_column >= exit.columns) return;
  const int lane = threadIdx.x % warp_threads;
  const int warp = threadIdx.x / warp_threads;

  const Span chunk = chunk_of_slot(plan, blockIdx.x);
  const int64_t first_token = chunk.begin + warp * warp_threads;
  const int64_t token = first_token + lane;
  const unsigned valid = __ballot_sync(full_warp, token < chunk.end && is_valid(plan, chunk.sequence, token));

  float first_weight = 1.0f;
  float weight_step = 0.0f;
  if (plan.mode == Mode::weightedmean) {
    const int64_t origin = first_valid_token(plan, whole_sequence(plan, chunk.sequence));
    first_weight = static_cast<float>(first_token - origin + 1);
    weight_step = 1.0f;
  }

  const T* const tokens = static_cast<const T*>(exit.data) + chunk.sequence * exit.sequence_stride +
                          first_token * exit.token_stride + first_column;
  const int columns = exit.columns - first_column;  // in this tile and those to its right
  float result[vector_size<T>];
#pragma unroll
  for (int i = 0; i < vector_size<T>; ++i) result[i] = Step::identity;

  const int lane_column = lane * vector_size<T>;
  if (vectorised && lane_column + vector_size<T> <= columns) {
    const auto load_whole = [&](int index, T(&values)[vector_size<T>]) {
      device::load_vector(tokens + index * exit.token_stride + lane_column, values);
    };
    reduce_tokens<Step, T>(valid, first_weight, weight_step, load_whole, result);
  } else {
    const auto load_each = [&](int index, T(&values)[vector_size<T>]) {
#pragma unroll
      for (int i = 0; i < vector_size<T>; ++i) {
        const int column = column_in_tile<T, vectorised>(lane, i);
        if (column < columns) values[i] = tokens[index * exit.token_stride + column];
      }
    };
    if (column_in_tile<T, vectorised>(lane, 0) < columns) {
      reduce_tokens<Step, T>(valid, first_weight, weight_step, load_each, result);
    }
  }

  __shared__ alignas(16) float of_warp[reduce_warps][tile_columns<T>];
#pragma unroll
  for (int i = 0; i < vector_size<T>; ++i) of_warp[warp][column_in_tile<T, vectorised>(lane, i)] = result[i];
  __syncthreads();
  float* const sums = plan.chunk_sums + (blockIdx.z * plan.slots + blockIdx.x) * plan.columns + first_column;
  for (int column = threadIdx.x; column < tile_columns<T> && column < columns; column += chunk_tokens) {
    float joined = of_warp[0][column];
#pragma unroll
    for (int other = 1; other < reduce_warps; ++other) joined = Step::combine(joined, of_warp[other][column]);
    sums[column] = joined;
  }
}

// --- finish_rows
// ------------------------------------------------------------------------------------------------------

// What a mode needs to know of the valid tokens of a sequence.
struct Extent {
  int64_t count;
  int64_t picked;  // the token that cls and lasttoken take
  float divisor;
};

// Found by the whole block.
__device__ Extent extent_of(const Plan& plan, const Span& whole) {
  const auto add = [](int64_t a, int64_t b) { return a + b; };
  const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const auto larger = [](int64_t a, int64_t b) { return a < b ? b : a; };
  int64_t count = 0;
  int64_t position_sum = 0;
  int64_t first = whole.end;
  int64_t last = -1;
  for (int64_t token = whole.begin + threadIdx.x; token < whole.end; token += finish_threads) {
    if (!is_valid(plan, whole.sequence, token)) continue;
    count += 1;
    position_sum += token;
    first = smaller(first, token);
    last = token;
  }
  count = device::block_reduce<finish_threads, int64_t>(count, 0, add);
  Extent extent = {count, 0, 1.0f};
  switch (plan.mode) {
    case Mode::mean:
      extent.divisor = static_cast<float>(count);
      break;
    case Mode::mean_sqrt_len:
      extent.divisor = sqrtf(static_cast<float>(count));
      break;
    case Mode::weightedmean: {
      first = device::block_reduce<finish_threads, int64_t>(first, whole.end, smaller);
      position_sum = device::block_reduce<finish_threads, int64_t>(position_sum, 0, add);
      extent.divisor = static_cast<float>(position_sum - count * (first - 1));
      break;
    }
    case Mode::cls:
      extent.picked = device::block_reduce<finish_threads, int64_t>(first, whole.end, smaller);
      break;
    case Mode::lasttoken:
      extent.picked = device::block_reduce<finish_threads, int64_t>(last, -1, larger);
      break;
    case Mode::max:
      break;
  }
  return extent;
}

__device__ float joined_chunks(const Plan& plan, const float* sums, int64_t chunks, int column) {
  const bool largest = plan.mode == Mode::max;
  float joined = sums[column];
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    const float next = sums[chunk * plan.columns + column];
    joined = largest ? Maximum::combine(joined, next) : WeightedSum::combine(joined, next);
  }
  return joined;
}

// Grid: sequences, exits.
__global__ void __launch_bounds__(finish_threads) finish_rows(const __grid_constant__ Plan plan) {
  const int64_t sequence = blockIdx.x;
  const DeviceExit& exit = plan.exits[blockIdx.y];
  const Span whole = whole_sequence(plan, sequence);
  const Extent extent = extent_of(plan, whole);

  const bool picks = plan.mode == Mode::cls || plan.mode == Mode::lasttoken;
  const int64_t picked = sequence * exit.sequence_stride + extent.picked * exit.token_stride;
  const float* const sums = plan.chunk_sums + (blockIdx.y * plan.slots + first_slot(plan, sequence)) * plan.columns;
  const int64_t chunks = chunks_of(whole.end - whole.begin);
  float* const pooled = plan.pooled_vectors + (blockIdx.y * plan.sequences + sequence) * plan.columns;
  for (int column = threadIdx.x; column < exit.columns; column += finish_threads) {
    float value = 0.0f;
    if (extent.count > 0) {
      value = picks ? device::load(exit.data, plan.dtype, picked + column)
                    : joined_chunks(plan, sums, chunks, column) / extent.divisor;
    }
    pooled[column] = value;
  }
  __syncthreads();

  float squares = 0.0f;  // of the columns before `summed`
  int summed = 0;
  for (int i = 0; i < exit.prefixes; ++i) {
    const DevicePrefix& prefix = plan.prefixes[exit.first_prefix + i];
    float norm = 1.0f;
    if (plan.normalize) {
      float more = 0.0f;
      for (int column = summed + threadIdx.x; column < prefix.dim; column += finish_threads) {
        more = fmaf(pooled[column], pooled[column], more);
      }
      squares += device::block_reduce<finish_threads>(more, 0.0f, [](float a, float b) { return a + b; });
      summed = prefix.dim;
      norm = sqrtf(squares);
      if (norm < norm_eps) norm = norm_eps;  // not fmaxf, which would drop a NaN
    }
    for (int column = threadIdx.x; column < prefix.dim; column += finish_threads) {
      device::store(prefix.data, plan.out_dtype, sequence * prefix.dim + column, pooled[column] / norm);
    }
  }
}

// --- launches
// ---------------------------------------------------------------------------------------------------------

template <class T, class Step>
void launch_reduce(const Plan& plan, int exits, bool vectorised, cudaStream_t stream) {
  const int64_t tiles = (plan.columns + tile_columns<T> - 1) / tile_columns<T>;
  const dim3 grid(static_cast<unsigned>(plan.slots), static_cast<unsigned>(tiles), static_cast<unsigned>(exits));
  if (vectorised) {
    reduce_chunks<T, Step, true><<<grid, chunk_tokens, 0, stream>>>(plan);
  } else {
    reduce_chunks<T, Step, false><<<grid, chunk_tokens, 0, stream>>>(plan);
  }
  fastembed::cuda::check_launch("reduce_chunks");
}

template <class T>
void launch_reduce(const Plan& plan, int exits, bool vectorised, cudaStream_t stream) {
  if (plan.mode == Mode::max) {
    launch_reduce<T, Maximum>(plan, exits, vectorised, stream);
  } else {
    launch_reduce<T, WeightedSum>(plan, exits, vectorised, stream);
  }
}

void launch(const Plan& plan, int exits, bool vectorised, cudaStream_t stream) {
  if (plan.mode != Mode::cls && plan.mode != Mode::lasttoken && plan.slots > 0) {
    switch (plan.dtype) {
      case DType::f32:
        launch_reduce<float>(plan, exits, vectorised, stream);
        break;
      case DType::bf16:
        launch_reduce<__nv_bfloat16>(plan, exits, vectorised, stream);
        break;
      case DType::f16:
        launch_reduce<__half>(plan, exits, vectorised, stream);
        break;
    }
  }
  const dim3 grid(static_cast<unsigned>(plan.sequences), static_cast<unsigned>(exits));
  finish_rows<<<grid, finish_threads, 0, stream>>>(plan);
  fastembed::cuda::check_launch("finish_rows");
}

bool is_aligned(const Exit& exit, DType dtype) {
  const auto bytes = [&](int64_t elements) { return elements * size_of(dtype); };
  return reinterpret_cast<uintptr_t>(exit.data) % device::vector_bytes == 0 &&
         bytes(exit.sequence_stride) % device::vector_bytes == 0 &&
         bytes(exit.token_stride) % device::vector_bytes == 0;
}

int64_t largest_dim(const std::vector<Prefix>& prefixes) {
  int64_t largest = 0;
  for (const Prefix& prefix : prefixes) largest = std::max(largest, prefix.dim);
  return largest;
}

// As many prefixes of as many exits as one launch takes.
class Group {
 public:
  explicit Group(const Plan& common) : plan_(common) {}

  bool empty() const { return exits_ == 0; }
  bool takes(size_t prefixes) const {
    return exits_ < most_exits && prefixes_ + static_cast<int>(prefixes) <= most_prefixes;
  }

  void add(const Exit& exit, std::vector<Prefix> prefixes) {
    std::sort(prefixes.begin(), prefixes.end(), [](const Prefix& a, const Prefix& b) { return a.dim < b.dim; });
    plan_.exits[exits_++] = {exit.data,         exit.sequence_stride,
                             exit.token_stride, static_cast<int>(prefixes.back().dim),
                             prefixes_,         static_cast<int>(prefixes.size())};
    for (const Prefix& prefix : prefixes) plan_.prefixes[prefixes_++] = {prefix.data, static_cast<int>(prefix.dim)};
    vectorised_ = vectorised_ && is_aligned(exit, plan_.dtype);
  }

  void run(cudaStream_t stream) const { launch(plan_, exits_, vectorised_, stream); }

 private:
  Plan plan_;
  int exits_ = 0;
  int prefixes_ = 0;
  bool vectorised_ = true;
};

void check_grid(const Plan& plan) {
  constexpr int64_t most_x = 0x7fffffff;
  constexpr int64_t most_columns = 65535 * int64_t{warp_threads} * vector_size<float>;
  if (plan.slots > most_x || plan.sequences > most_x || plan.columns > most_columns) {
    throw std::runtime_error("pool_exits: " + std::to_string(plan.sequences) + " sequences of " +
                             std::to_string(plan.tokens) + " tokens and " + std::to_string(plan.columns) +
                             " columns are more than one launch takes");
  }
}

}  // namespace

int64_t workspace_floats(int64_t exits, int64_t columns, const Batch& batch) {
  return std::min<int64_t>(exits, most_exits) * (slot_count(batch) + batch.sequences) * columns;
}

void pool_exits(const std::vector<Exit>& exits, const Batch& batch, Mode mode, DType dtype, DType out_dtype,
                bool normalize, float* workspace, void* stream) {
  Plan common = {};
  common.sequences = batch.sequences;
  common.tokens = batch.tokens;
  if (batch.mask != nullptr) common.mask = *batch.mask;
  if (batch.offsets != nullptr) common.offsets = *batch.offsets;
  common.mode = mode;
  common.dtype = dtype;
  common.out_dtype = out_dtype;
  common.normalize = normalize;
  common.slots = slot_count(batch);
  for (const Exit& exit : exits) common.columns = std::max(common.columns, largest_dim(exit.prefixes));
  common.chunk_sums = workspace;
  common.pooled_vectors = workspace + std::min<int64_t>(exits.size(), most_exits) * common.slots * common.columns;
  check_grid(common);
  if (batch.sequences == 0) return;

  Group group(common);
  const auto run_group = [&] {
    group.run(static_cast<cudaStream_t>(stream));
    group = Group(common);
  };
  for (const Exit& exit : exits) {
    for (size_t first = 0; first < exit.prefixes.size(); first += most_prefixes) {
      const size_t end = std::min(first + most_prefixes, exit.prefixes.size());
      if (!group.takes(end - first)) run_group();
      group.add(exit, {exit.prefixes.begin() + first, exit.prefixes.begin() + end});
    }
  }
  if (!group.empty()) run_group();
}

}  // namespace fastembed::pooling::cuda
