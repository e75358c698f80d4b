// Multi-exit pooling: two launches for up to 16 exits with all their dims, one for the modes that pick a token.
//
//   reduce_chunks  sums (or takes the maximum of) the valid tokens of one chunk of one sequence, over one tile of
//                  columns of one exit, into the workspace. Padding is skipped, not multiplied by zero.
//   finish_rows    joins the chunks of a sequence, divides, and writes every prefix of the pooled vector: normalised,
//                  from one running sum of squares, or as int8 or packed bits.
//
// Nothing is added atomically and a chunk has a fixed length, so that a row's result depends neither on scheduling nor
// on the rest of the batch. Packed sequences are found on the device, from the number of tokens and sequences alone: a
// grid slot per chunk, of which a sequence that starts at token s owns those from s / chunk_tokens + its own number on;
// it can never need more than there are before the next sequence's.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>

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

// Each warp of reduce_chunks takes 32 tokens, whose mask fits one ballot.
constexpr int reduce_warps = 4;
constexpr int chunk_tokens = reduce_warps * warp_threads;
// Loads that a thread has in flight.
constexpr int tokens_in_flight = 4;
template <class T>
constexpr int tile_columns = warp_threads * vector_size<T>;

constexpr int finish_threads = 256;
struct DeviceExit {
  const void* data;
  int64_t sequence_stride;
  int64_t token_stride;
  int columns;  // that any prefix needs
  int first_prefix;
  int prefixes;
  float* pooled;    // [sequences, columns]
  int32_t* winner;  // the same, if wanted: the token that each largest value is of; -1 without tokens
};

struct DevicePrefix {
  void* data;
  int dim;
};

// The parameters of both kernels. Prefixes rise in dim within an exit.
struct Plan {
  DeviceExit exits[most_exits];
  DevicePrefix prefixes[most_prefixes];
  DeviceBatch batch;
  DType dtype;
  OutputType out_type;
  bool normalize;
  int64_t slots;           // chunks in the grid
  int64_t columns;         // row length of the arrays below
  float* chunk_sums;       // [exits, slots, columns]
  int32_t* chunk_winners;  // the same, when winners are wanted, else null
};
static_assert(sizeof(Plan) <= 4096, "kernel parameters");

__host__ __device__ constexpr int64_t chunks_of(int64_t tokens) { return (tokens + chunk_tokens - 1) / chunk_tokens; }

int64_t slot_count(const Batch& batch) {
  if (batch.offsets == nullptr) return batch.sequences * chunks_of(batch.tokens);
  return batch.tokens / chunk_tokens + batch.sequences;
}

__device__ int64_t first_slot(const DeviceBatch& batch, int64_t sequence) {
  if (batch.offsets.data == nullptr) return sequence * chunks_of(batch.tokens);
  return offset(batch, sequence) / chunk_tokens + sequence;
}

// The chunk that a slot stands for; empty for the slots that a sequence leaves over.
__device__ Span chunk_of_slot(const DeviceBatch& batch, int64_t slot) {
  const int64_t sequence = last_sequence_from(batch, slot, [&](int64_t other) { return first_slot(batch, other); });
  const Span whole = whole_sequence(batch, sequence);
  const int64_t chunk = slot - first_slot(batch, sequence);
  if (chunk < 0) return {sequence, whole.begin, whole.begin};
  const int64_t begin = whole.begin + chunk * chunk_tokens;
  return {sequence, begin, begin + chunk_tokens < whole.end ? begin + chunk_tokens : whole.end};
}

// --- reduce_chunks
// ----------------------------------------------------------------------------------------------------

struct WeightedSum {
  using Value = float;
  static constexpr int blocks = 4;  // per multiprocessor, which registers are allotted for
  __device__ static Value identity() { return 0.0f; }
  __device__ static Value combine(Value a, Value b) { return a + b; }
  __device__ static Value add(Value sum, float weight, float x, int64_t) { return fmaf(weight, x, sum); }
};

// NaN once a NaN was seen.
struct Maximum {
  using Value = float;
  static constexpr int blocks = 4;
  __device__ static Value identity() { return -INFINITY; }
  __device__ static Value combine(Value a, Value b) { return b > a || b != b ? b : a; }
  __device__ static Value add(Value largest, float, float x, int64_t) { return combine(largest, x); }
};

// The same, and the first token that it is of, where `a` is of tokens before those of `b`.
struct MaximumAndWinner {
  struct Value {
    float largest;
    int32_t token;
  };
  static constexpr int blocks = 3;
  __device__ static Value identity() { return {-INFINITY, -1}; }
  __device__ static Value combine(Value a, Value b) {
    const bool larger = b.largest > a.largest || (b.largest != b.largest && a.largest == a.largest);
    return b.token >= 0 && (larger || a.token < 0) ? b : a;
  }
  __device__ static Value add(Value best, float, float x, int64_t token) {
    return combine(best, {x, static_cast<int32_t>(token)});
  }
};

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

__device__ void store_partial(const Plan& plan, int64_t index, float value) { plan.chunk_sums[index] = value; }

__device__ void store_partial(const Plan& plan, int64_t index, MaximumAndWinner::Value value) {
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

// --- finish_rows
// ------------------------------------------------------------------------------------------------------

__device__ float joined_chunks(const Plan& plan, const float* sums, int64_t chunks, int column) {
  const bool largest = plan.batch.mode == Mode::max;
  float joined = sums[column];
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    const float next = sums[chunk * plan.columns + column];
    joined = largest ? Maximum::combine(joined, next) : WeightedSum::combine(joined, next);
  }
  return joined;
}

__device__ MaximumAndWinner::Value joined_winners(const Plan& plan, int64_t first, int64_t chunks, int column) {
  MaximumAndWinner::Value joined = MaximumAndWinner::identity();
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t index = first + chunk * plan.columns + column;
    joined = MaximumAndWinner::combine(joined, {plan.chunk_sums[index], plan.chunk_winners[index]});
  }
  return joined;
}

// Writes one prefix of a pooled vector as int8, 127 standing for its largest magnitude; zeros if that is not usable.
__device__ void write_int8(const float* pooled, int dim, float largest, int8_t* codes) {
  const bool usable = largest > 0.0f && largest < INFINITY;
  for (int column = threadIdx.x; column < dim; column += finish_threads) {
    codes[column] = usable ? static_cast<int8_t>(rintf(pooled[column] / largest * 127.0f)) : int8_t{0};
  }
}

// Writes the signs of one prefix, eight to a byte, the first in its highest bit.
__device__ void write_bits(const float* pooled, int dim, uint8_t* codes) {
  for (int byte = threadIdx.x; byte * 8 < dim; byte += finish_threads) {
    unsigned bits = 0;
    for (int i = 0; i < 8; ++i) {
      const int column = byte * 8 + i;
      bits = bits * 2 + (column < dim && pooled[column] > 0.0f);
    }
    codes[byte] = static_cast<uint8_t>(bits);
  }
}

// What prefixes are written as.
struct Floats {};
struct Int8 {};
struct Bits {};

// Grid: sequences, exits.
template <class Form>
__global__ void __launch_bounds__(finish_threads) finish_rows(const __grid_constant__ Plan plan) {
  const int64_t sequence = blockIdx.x;
  const DeviceExit& exit = plan.exits[blockIdx.y];
  const DeviceBatch& batch = plan.batch;
  const Span whole = whole_sequence(batch, sequence);
  const Extent extent = extent_of<finish_threads>(batch, whole);

  const bool picks = batch.mode == Mode::cls || batch.mode == Mode::lasttoken;
  const int64_t picked = sequence * exit.sequence_stride + extent.token * exit.token_stride;
  const int64_t first = (blockIdx.y * plan.slots + first_slot(batch, sequence)) * plan.columns;
  const int64_t chunks = chunks_of(whole.end - whole.begin);
  float* const pooled = exit.pooled + sequence * exit.columns;
  for (int column = threadIdx.x; column < exit.columns; column += finish_threads) {
    float value = 0.0f;
    int32_t winner = -1;
    if (extent.count > 0) {
      if (picks) {
        value = device::load(exit.data, plan.dtype, picked + column);
      } else if (exit.winner != nullptr) {
        const MaximumAndWinner::Value best = joined_winners(plan, first, chunks, column);
        value = best.largest;
        winner = best.token;
      } else {
        value = joined_chunks(plan, plan.chunk_sums + first, chunks, column) / extent.divisor;
      }
    }
    pooled[column] = value;
    if (exit.winner != nullptr) exit.winner[sequence * exit.columns + column] = winner;
  }
  __syncthreads();

  [[maybe_unused]] float squares = 0.0f;  // of the columns before `seen`
  [[maybe_unused]] float largest = 0.0f;  // magnitude among them
  int seen = 0;
  for (int i = 0; i < exit.prefixes; ++i) {
    const DevicePrefix& prefix = plan.prefixes[exit.first_prefix + i];
    if constexpr (std::is_same_v<Form, Bits>) {
      write_bits(pooled, prefix.dim, static_cast<uint8_t*>(prefix.data) + sequence * ((prefix.dim + 7) / 8));
    } else if constexpr (std::is_same_v<Form, Int8>) {
      float more = 0.0f;
      for (int column = seen + threadIdx.x; column < prefix.dim; column += finish_threads) {
        more = Maximum::combine(more, fabsf(pooled[column]));
      }
      more = device::block_reduce<finish_threads>(more, 0.0f, [](float a, float b) { return Maximum::combine(a, b); });
      largest = Maximum::combine(largest, more);
      write_int8(pooled, prefix.dim, largest, static_cast<int8_t*>(prefix.data) + sequence * prefix.dim);
    } else {
      float norm = 1.0f;
      if (plan.normalize) {
        float more = 0.0f;
        for (int column = seen + threadIdx.x; column < prefix.dim; column += finish_threads) {
          more = fmaf(pooled[column], pooled[column], more);
        }
        squares += device::block_reduce<finish_threads>(more, 0.0f, [](float a, float b) { return a + b; });
        norm = sqrtf(squares);
        if (norm < norm_eps) norm = norm_eps;  // not fmaxf, which would drop a NaN
      }
      for (int column = threadIdx.x; column < prefix.dim; column += finish_threads) {
        device::store(prefix.data, static_cast<DType>(plan.out_type), sequence * prefix.dim + column,
                      pooled[column] / norm);
      }
    }
    seen = prefix.dim;
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
  if (plan.chunk_winners != nullptr) {
    launch_reduce<T, MaximumAndWinner>(plan, exits, vectorised, stream);
  } else if (plan.batch.mode == Mode::max) {
    launch_reduce<T, Maximum>(plan, exits, vectorised, stream);
  } else {
    launch_reduce<T, WeightedSum>(plan, exits, vectorised, stream);
  }
}

void launch(const Plan& plan, int exits, bool vectorised, cudaStream_t stream) {
  if (plan.batch.mode != Mode::cls && plan.batch.mode != Mode::lasttoken && plan.slots > 0) {
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
  const dim3 grid(static_cast<unsigned>(plan.batch.sequences), static_cast<unsigned>(exits));
  switch (plan.out_type) {
    case OutputType::i8:
      finish_rows<Int8><<<grid, finish_threads, 0, stream>>>(plan);
      break;
    case OutputType::bits:
      finish_rows<Bits><<<grid, finish_threads, 0, stream>>>(plan);
      break;
    default:
      finish_rows<Floats><<<grid, finish_threads, 0, stream>>>(plan);
  }
  fastembed::cuda::check_launch("finish_rows");
}

bool is_aligned(const Exit& exit, DType dtype) {
  const auto bytes = [&](int64_t elements) { return elements * size_of(dtype); };
  return reinterpret_cast<uintptr_t>(exit.data) % device::vector_bytes == 0 &&
         bytes(exit.sequence_stride) % device::vector_bytes == 0 &&
         bytes(exit.token_stride) % device::vector_bytes == 0;
}

// As many prefixes of as many exits as one launch takes.
class Group {
 public:
  explicit Group(const Plan& common) : plan_(common) {}

  bool empty() const { return exits_ == 0; }
  bool takes(size_t prefixes) const {
    return exits_ < most_exits && prefixes_ + static_cast<int>(prefixes) <= most_prefixes;
  }

  // Prefixes that rise in dim. Without a state the pooled vectors go to the workspace, `scratch` floats per exit.
  void add(const Exit& exit, const std::vector<Prefix>& prefixes, const State& state, float* scratch,
           int64_t scratch_floats) {
    float* const pooled = state.pooled != nullptr ? state.pooled : scratch + exits_ * scratch_floats;
    plan_.exits[exits_++] = {exit.data,
                             exit.sequence_stride,
                             exit.token_stride,
                             static_cast<int>(prefixes.back().dim),
                             prefixes_,
                             static_cast<int>(prefixes.size()),
                             pooled,
                             state.winner};
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
  if (plan.slots > most_x || plan.batch.sequences > most_x || plan.columns > most_columns) {
    throw std::runtime_error("pool_exits: " + std::to_string(plan.batch.sequences) + " sequences of " +
                             std::to_string(plan.batch.tokens) + " tokens and " + std::to_string(plan.columns) +
                             " columns are more than one launch takes");
  }
}

}  // namespace

int64_t workspace_floats(int64_t exits, int64_t columns, const Batch& batch) {
  // Chunks, their winners, pooled vectors.
  return std::min<int64_t>(exits, most_exits) * (2 * slot_count(batch) + batch.sequences) * columns;
}

void pool_exits(std::vector<Exit> exits, const std::vector<State>& states, const Batch& batch, Mode mode, DType dtype,
                OutputType out_type, bool normalize, float* workspace, void* stream) {
  Plan common = {};
  common.batch = to_device(batch, mode);
  common.dtype = dtype;
  common.out_type = out_type;
  common.normalize = normalize;
  common.slots = slot_count(batch);
  for (Exit& exit : exits) {
    std::sort(exit.prefixes.begin(), exit.prefixes.end(), [](auto& a, auto& b) { return a.dim < b.dim; });
    common.columns = std::max(common.columns, exit.prefixes.back().dim);
  }
  const int64_t all_chunks = std::min<int64_t>(exits.size(), most_exits) * common.slots * common.columns;
  const bool winners = mode == Mode::max && !states.empty();
  common.chunk_sums = workspace;
  common.chunk_winners = winners ? reinterpret_cast<int32_t*>(workspace + all_chunks) : nullptr;
  float* const scratch = workspace + 2 * all_chunks;
  check_grid(common);
  if (batch.sequences == 0) return;

  Group group(common);
  const auto run_group = [&] {
    group.run(static_cast<cudaStream_t>(stream));
    group = Group(common);
  };
  for (size_t e = 0; e < exits.size(); ++e) {
    const std::vector<Prefix>& prefixes = exits[e].prefixes;
    for (size_t first = 0; first < prefixes.size(); first += most_prefixes) {
      const size_t end = std::min(first + most_prefixes, prefixes.size());
      if (!group.takes(end - first)) run_group();
      // The state is of the largest prefix, which stands in the last part.
      const bool keeps = !states.empty() && end == prefixes.size();
      group.add(exits[e], {prefixes.begin() + first, prefixes.begin() + end}, keeps ? states[e] : State{}, scratch,
                batch.sequences * common.columns);
    }
  }
  if (!group.empty()) run_group();
}

}  // namespace fastembed::pooling::cuda
