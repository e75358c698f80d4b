// Work is cut into (exit, sequence, range of columns). Ranges exist to keep the accumulators in the first-level cache
// and to give every thread work when there are few sequences; whoever finishes the last range of a row writes its
// prefixes.
#include "pooling/pooling.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>

#include "common/threading.hpp"
#include "pooling/active_kernels.hpp"
#include "pooling/token_plan.hpp"

namespace fastembed::pooling {

namespace {

// Reading less than this per thread takes less time than waking one.
constexpr int64_t bytes_per_thread = 256 << 10;
// Ranges of fewer columns than this read too little of a token at a time to run at memory speed.
constexpr int64_t min_columns = 64;

Kernels::Reduce reduce_for(const Kernels& kernels, Mode mode, DType dtype) {
  const auto* by_dtype = mode == Mode::max            ? kernels.max
                         : mode == Mode::weightedmean ? kernels.weighted_sum
                                                      : kernels.sum;
  return by_dtype[static_cast<int>(dtype)];
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t columns_of(const Exit& exit) { return exit.prefixes.back().dim; }

struct Call {
  const std::vector<Exit>& exits;
  const std::vector<State>& states;
  const TokenPlan& plan;
  int64_t sequences;
  int64_t rows;  // of all exits
  int64_t element_size;
  bool normalize;
  int team;
  Kernels::Reduce reduce;
  Kernels::MaxAndWinner max_and_winner;
  Kernels::Write write;

  Tokens tokens_of(int64_t row) const {
    const Exit& exit = exits[row / sequences];
    const int64_t sequence = row % sequences;
    const TokenPlan::Sequence& tokens = plan[sequence];
    const int64_t offset = sequence * exit.sequence_stride + tokens.start * exit.token_stride;
    const char* data = static_cast<const char*>(exit.data) + offset * element_size;
    return {data, exit.token_stride, tokens.index, tokens.count};
  }

  // What the thread that is at a row will come to after it, as far as that can be foretold.
  Tokens tokens_after(int64_t row) const {
    const int64_t next = row + team;
    const bool same_layout = next < rows && exits[next / sequences].token_stride == exits[row / sequences].token_stride;
    return same_layout ? tokens_of(next) : Tokens{nullptr, 0, nullptr, 0};
  }

  void reduce_range(int64_t row, int64_t first, int64_t columns, float* pooled) const {
    const TokenPlan::Sequence& sequence = plan[row % sequences];
    int32_t* winner = winner_of(row);
    if (winner != nullptr) winner += first;
    if (sequence.count == 0) {
      std::fill_n(pooled, columns, 0.f);
      if (winner != nullptr) std::fill_n(winner, columns, -1);
    } else if (winner != nullptr) {
      max_and_winner(tokens_of(row), first, columns, pooled, winner);
    } else {
      reduce(tokens_of(row), tokens_after(row), first, columns, sequence.divisor, pooled);
    }
  }

  void write_row(int64_t row, const float* pooled) const {
    const std::vector<Prefix>& prefixes = exits[row / sequences].prefixes;
    write(pooled, prefixes.data(), static_cast<int64_t>(prefixes.size()), row % sequences, normalize);
    if (states.empty()) return;
    const int64_t columns = columns_of(exits[row / sequences]);
    std::copy_n(pooled, columns, states[row / sequences].pooled + row % sequences * columns);
  }

  int32_t* winner_of(int64_t row) const {
    if (states.empty() || states[row / sequences].winner == nullptr) return nullptr;
    return states[row / sequences].winner + row % sequences * columns_of(exits[row / sequences]);
  }
};

void run_whole_rows(const Call& call, int64_t rows, int threads) {
  parallel_for(rows, threads, [&](int64_t row) {
    alignas(64) float pooled[max_columns];
    call.reduce_range(row, 0, columns_of(call.exits[row / call.sequences]), pooled);
    call.write_row(row, pooled);
  });
}

void run_ranges(const Call& call, int64_t rows, int64_t most_columns, int64_t ranges, int threads) {
  const std::unique_ptr<float[]> pooled(new float[rows * most_columns]);
  const std::unique_ptr<std::atomic<int64_t>[]> unfinished(new std::atomic<int64_t>[rows]);
  for (int64_t row = 0; row < rows; ++row) unfinished[row].store(ranges, std::memory_order_relaxed);
  parallel_for(rows * ranges, threads, [&](int64_t task) {
    const int64_t row = task / ranges;
    const int64_t columns = columns_of(call.exits[row / call.sequences]);
    const int64_t per_range = ceil_div(ceil_div(columns, ranges), min_columns) * min_columns;
    const int64_t first = std::min(columns, task % ranges * per_range);
    float* row_pooled = pooled.get() + row * most_columns;
    call.reduce_range(row, first, std::min(per_range, columns - first), row_pooled + first);
    if (unfinished[row].fetch_sub(1, std::memory_order_acq_rel) == 1) call.write_row(row, row_pooled);
  });
}

}  // namespace

void pool_exits(std::vector<Exit> exits, const std::vector<State>& states, const Batch& batch, Mode mode, DType dtype,
                OutputType out_type, bool normalize, int threads) {
  const TokenPlan plan(batch, mode);
  int64_t most_columns = 0, all_columns = 0;
  for (Exit& exit : exits) {
    std::sort(exit.prefixes.begin(), exit.prefixes.end(), [](auto& a, auto& b) { return a.dim < b.dim; });
    most_columns = std::max(most_columns, columns_of(exit));
    all_columns += columns_of(exit);
  }
  const int64_t rows = static_cast<int64_t>(exits.size()) * batch.sequences;
  const int64_t bytes = plan.tokens_to_read() * all_columns * size_of(dtype);
  const int team = team_size(1 + bytes / bytes_per_thread, threads);
  const Kernels& kernels = active_kernels();
  const Call call = {exits,
                     states,
                     plan,
                     batch.sequences,
                     rows,
                     size_of(dtype),
                     normalize,
                     team,
                     reduce_for(kernels, mode, dtype),
                     kernels.max_and_winner[static_cast<int>(dtype)],
                     kernels.write[static_cast<int>(out_type)]};

  // Twice as many tasks as threads, so that none waits long for the last; no more ranges than are worth it.
  const int64_t ranges_for_threads = team == 1 || rows == 0 ? 1 : ceil_div(2 * team, rows);
  const int64_t ranges =
      std::max(ceil_div(most_columns, max_columns), std::min(ranges_for_threads, ceil_div(most_columns, min_columns)));
  if (ranges == 1) {
    run_whole_rows(call, rows, team);
  } else {
    run_ranges(call, rows, most_columns, ranges, team);
  }
}

}  // namespace fastembed::pooling
