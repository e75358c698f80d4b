// Multi-exit pooling: two launches for up to 16 exits with all their dims, reduce_chunks and finish_rows, each in the
// header of its name; one for the modes that pick a token. Nothing is added atomically.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/device_dtype.cuh"
#include "common/launch_check.cuh"
#include "pooling/finish_rows.cuh"
#include "pooling/plan.cuh"
#include "pooling/pooling_cuda.hpp"
#include "pooling/reduce_chunks.cuh"
#include "pooling/reductions.cuh"

namespace fastembed::pooling::cuda {
namespace {

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
