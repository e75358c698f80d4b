// The way back from the gradients of prefixes to those of hidden states: two launches for up to 16 exits.
//
//   gather_prefixes  the gradient of one pooled vector, from those of all its prefixes, through truncation and
//                    normalisation; and what the mode needs to know of the sequence's tokens.
//   write_tokens     every gradient once, whole vectors of columns at a time: the weight of the token times the
//                    sequence's gradient, zeros for padding and beyond the largest prefix. Nothing of the hidden states
//                    is read.
//
// A token finds its sequence, not the other way round: whatever the offsets hold, each gradient is written by one
// thread, and none is left out.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/device_dtype.cuh"
#include "common/device_reduce.cuh"
#include "common/launch_check.cuh"
#include "pooling/pooling_cuda.hpp"
#include "pooling/sequences.cuh"

namespace fastembed::pooling::cuda {
namespace {

using device::full_warp;
using device::vector_size;
using device::warp_threads;

constexpr int gather_threads = 256;
// Each warp of write_tokens takes 32 tokens, one lane finding what belongs to one of them.
constexpr int write_warps = 4;
constexpr int write_threads = write_warps * warp_threads;
template <class T>
constexpr int tile_columns = warp_threads * vector_size<T>;

struct GradientExit {
  void* data;           // [rows, size]
  const float* pooled;  // [sequences, columns]
  const int32_t* winner;
  float* grad;  // of the pooled vectors: [sequences, columns]
  int64_t size;
  int columns;
  int first_prefix;
  int prefixes;
  bool continues;  // prefixes of an earlier launch are in `grad` already
};

struct PrefixGradient {
  const void* data;
  int dim;
};

// The parameters of both kernels. Prefixes rise in dim within an exit.
struct GradientPlan {
  GradientExit exits[most_exits];
  PrefixGradient prefixes[most_prefixes];
  DeviceBatch batch;
  DType prefix_dtype;
  bool normalize;
  int64_t rows;     // tokens of all sequences, padding included
  Extent* extents;  // [sequences]
};
static_assert(sizeof(GradientPlan) <= 4096, "kernel parameters");

// --- gather_prefixes

// With y = p / n, n = max(|p|, eps): dp = (dy - y (y . dy)) / n, without the second term where eps is larger.
// Grid: sequences, exits.
__global__ void __launch_bounds__(gather_threads) gather_prefixes(const __grid_constant__ GradientPlan plan) {
  const int64_t sequence = blockIdx.x;
  const GradientExit& exit = plan.exits[blockIdx.y];
  if (blockIdx.y == 0) {
    const Extent extent = extent_of<gather_threads>(plan.batch, whole_sequence(plan.batch, sequence));
    if (threadIdx.x == 0) plan.extents[sequence] = extent;
  }
  const auto add = [](float a, float b) { return a + b; };
  const float* const pooled = exit.pooled + sequence * exit.columns;
  float* const grad = exit.grad + sequence * exit.columns;
  // Every thread keeps to its own columns of `grad`.
  if (!exit.continues) {
    for (int column = threadIdx.x; column < exit.columns; column += gather_threads) grad[column] = 0.0f;
  }
  float squares = 0.0f;  // of the columns before `summed`
  int summed = 0;
  for (int i = 0; i < exit.prefixes; ++i) {
    const PrefixGradient& prefix = plan.prefixes[exit.first_prefix + i];
    const int64_t row = sequence * prefix.dim;
    if (!plan.normalize) {
      for (int column = threadIdx.x; column < prefix.dim; column += gather_threads) {
        grad[column] += device::load(prefix.data, plan.prefix_dtype, row + column);
      }
      continue;
    }
    float more = 0.0f;
    for (int column = summed + threadIdx.x; column < prefix.dim; column += gather_threads) {
      more = fmaf(pooled[column], pooled[column], more);
    }
    squares += device::block_reduce<gather_threads>(more, 0.0f, add);
    summed = prefix.dim;
    const float norm = sqrtf(squares);
    const float divisor = norm < norm_eps ? norm_eps : norm;  // not fmaxf, which would drop a NaN
    float along = 0.0f;
    if (norm > norm_eps) {
      for (int column = threadIdx.x; column < prefix.dim; column += gather_threads) {
        along = fmaf(pooled[column] / divisor, device::load(prefix.data, plan.prefix_dtype, row + column), along);
      }
      along = device::block_reduce<gather_threads>(along, 0.0f, add);
    }
    for (int column = threadIdx.x; column < prefix.dim; column += gather_threads) {
      const float of_prefix = device::load(prefix.data, plan.prefix_dtype, row + column);
      grad[column] += (of_prefix - pooled[column] / divisor * along) / divisor;
    }
  }
}

// --- write_tokens

// Where a row of a gradient comes from.
struct Source {
  int64_t sequence;
  int32_t position;  // of the token in its sequence
  float weight;      // of the token in the pooled vector; 0 if it does not count
};

__device__ Source source_of(const GradientPlan& plan, int64_t row) {
  const DeviceBatch& batch = plan.batch;
  Span whole = {0, 0, 0};
  int64_t token = row;
  if (batch.offsets.data == nullptr) {
    whole = whole_sequence(batch, row / batch.tokens);
    token = row - whole.sequence * batch.tokens;
  } else {
    whole = whole_sequence(batch,
                           last_sequence_from(batch, row, [&](int64_t sequence) { return offset(batch, sequence); }));
  }
  Source source = {whole.sequence, static_cast<int32_t>(token - whole.begin), 0.0f};
  if (token < whole.begin || token >= whole.end || !is_valid(batch, whole.sequence, token)) return source;
  const Extent& extent = plan.extents[whole.sequence];
  switch (batch.mode) {
    case Mode::cls:
    case Mode::lasttoken:
      source.weight = token == extent.token ? 1.0f : 0.0f;
      break;
    case Mode::weightedmean:
      source.weight = static_cast<float>(token - extent.token + 1);
      break;
    default:
      source.weight = 1.0f;
  }
  return source;
}

// Grid: 128 rows, tiles of columns, exits.
template <class T, bool vectorised>
__global__ void __launch_bounds__(write_threads) write_tokens(const __grid_constant__ GradientPlan plan) {
  const GradientExit& exit = plan.exits[blockIdx.z];
  const int first_column = blockIdx.y * tile_columns<T>;
  if (first_column >= exit.size) return;
  const int lane = threadIdx.x % warp_threads;
  const int64_t first_row = (int64_t{blockIdx.x} * write_warps + threadIdx.x / warp_threads) * warp_threads;
  const bool is_max = plan.batch.mode == Mode::max;
  Source mine = {-1, 0, 0.0f};
  if (first_row + lane < plan.rows) mine = source_of(plan, first_row + lane);

  int columns[vector_size<T>];
#pragma unroll
  for (int i = 0; i < vector_size<T>; ++i) {
    columns[i] = first_column + (vectorised ? lane * vector_size<T> + i : i * warp_threads + lane);
  }
  int64_t sequence = -1;  // of `grad` and `winner`
  float grad[vector_size<T>] = {};
  int32_t winner[vector_size<T>] = {};
  for (int i = 0; i < warp_threads && first_row + i < plan.rows; ++i) {
    const int64_t next = __shfl_sync(full_warp, mine.sequence, i);
    const int32_t position = __shfl_sync(full_warp, mine.position, i);
    const float weight = __shfl_sync(full_warp, mine.weight, i);
    if (next != sequence) {
      sequence = next;
      const float divisor = plan.extents[sequence].divisor;
#pragma unroll
      for (int column = 0; column < vector_size<T>; ++column) {
        const bool inside = columns[column] < exit.columns;
        const int64_t index = sequence * exit.columns + columns[column];
        grad[column] = inside ? exit.grad[index] / divisor : 0.0f;
        winner[column] = inside && is_max ? exit.winner[index] : 0;
      }
    }
    T values[vector_size<T>];
#pragma unroll
    for (int column = 0; column < vector_size<T>; ++column) {
      const bool counts = weight > 0.0f && columns[column] < exit.columns && (!is_max || winner[column] == position);
      values[column] = device::from_float<T>(counts ? weight * grad[column] : 0.0f);
    }
    T* const row = static_cast<T*>(exit.data) + (first_row + i) * exit.size;
    if (vectorised) {
      if (columns[0] < exit.size) device::store_vector(row + columns[0], values);
    } else {
#pragma unroll
      for (int column = 0; column < vector_size<T>; ++column) {
        if (columns[column] < exit.size) row[columns[column]] = values[column];
      }
    }
  }
}

// --- launches

template <class T>
void launch_write(const GradientPlan& plan, int exits, cudaStream_t stream) {
  int64_t largest = 0;
  bool vectorised = true;
  for (int e = 0; e < exits; ++e) {
    const GradientExit& exit = plan.exits[e];
    largest = std::max(largest, exit.size);
    vectorised = vectorised && exit.size % vector_size<T> == 0 &&
                 reinterpret_cast<uintptr_t>(exit.data) % device::vector_bytes == 0;
  }
  const dim3 grid(static_cast<unsigned>((plan.rows + write_threads - 1) / write_threads),
                  static_cast<unsigned>((largest + tile_columns<T> - 1) / tile_columns<T>),
                  static_cast<unsigned>(exits));
  if (vectorised) {
    write_tokens<T, true><<<grid, write_threads, 0, stream>>>(plan);
  } else {
    write_tokens<T, false><<<grid, write_threads, 0, stream>>>(plan);
  }
  fastembed::cuda::check_launch("write_tokens");
}

void launch_write(const GradientPlan& plan, int exits, DType dtype, cudaStream_t stream) {
  switch (dtype) {
    case DType::f32:
      return launch_write<float>(plan, exits, stream);
    case DType::bf16:
      return launch_write<__nv_bfloat16>(plan, exits, stream);
    case DType::f16:
      return launch_write<__half>(plan, exits, stream);
  }
}

void launch_gather(const GradientPlan& plan, int exits, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.batch.sequences), static_cast<unsigned>(exits));
  gather_prefixes<<<grid, gather_threads, 0, stream>>>(plan);
  fastembed::cuda::check_launch("gather_prefixes");
}

int64_t columns_of(const ExitGradient& exit) { return exit.prefixes.back().dim; }

constexpr int64_t extent_floats = sizeof(Extent) / sizeof(float);

}  // namespace

int64_t backward_workspace_floats(int64_t columns_of_all_exits, const Batch& batch) {
  return batch.sequences * (extent_floats + columns_of_all_exits);
}

void pool_exits_backward(std::vector<ExitGradient> exits, const Batch& batch, Mode mode, DType dtype,
                         DType prefix_dtype, bool normalize, float* workspace, void* stream) {
  GradientPlan common = {};
  common.batch = to_device(batch, mode);
  common.prefix_dtype = prefix_dtype;
  common.normalize = normalize;
  common.rows = (batch.offsets == nullptr ? batch.sequences : 1) * batch.tokens;
  common.extents = reinterpret_cast<Extent*>(workspace);
  constexpr int64_t most_rows = int64_t{0x7fffffff} * write_threads;
  if (batch.sequences > 0x7fffffff || common.rows > most_rows) {
    throw std::runtime_error("pool_exits_backward: " + std::to_string(batch.sequences) + " sequences and " +
                             std::to_string(common.rows) + " tokens are more than one launch takes");
  }
  if (common.rows == 0) return;
  const auto on_stream = static_cast<cudaStream_t>(stream);
  float* grad = workspace + batch.sequences * extent_floats;
  for (size_t first = 0; first < exits.size(); first += most_exits) {
    const int count = static_cast<int>(std::min<size_t>(most_exits, exits.size() - first));
    GradientPlan group = common;
    int prefixes = 0;
    for (int e = 0; e < count; ++e) {
      ExitGradient& exit = exits[first + e];
      std::sort(exit.prefixes.begin(), exit.prefixes.end(), [](auto& a, auto& b) { return a.dim < b.dim; });
      group.exits[e] = {exit.data,
                        exit.state.pooled,
                        exit.state.winner,
                        grad,
                        exit.size,
                        static_cast<int>(columns_of(exit)),
                        prefixes,
                        0,
                        false};
      grad += batch.sequences * columns_of(exit);
      for (const Prefix& prefix : exit.prefixes) {
        if (prefixes == most_prefixes) {
          launch_gather(group, e + 1, on_stream);
          for (int done = 0; done <= e; ++done) {
            group.exits[done].prefixes = 0;
            group.exits[done].continues = true;
          }
          group.exits[e].first_prefix = prefixes = 0;
        }
        group.prefixes[prefixes++] = {prefix.data, static_cast<int>(prefix.dim)};
        ++group.exits[e].prefixes;
      }
    }
    launch_gather(group, count, on_stream);
    launch_write(group, count, dtype, on_stream);
  }
}

}  // namespace fastembed::pooling::cuda
