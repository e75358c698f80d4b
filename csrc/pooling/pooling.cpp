#include "pooling/pooling.hpp"

#include <algorithm>
#include <memory>
#include <utility>

#include "common/threading.hpp"
#include "pooling/active_kernels.hpp"
#include "pooling/token_plan.hpp"
#include "pooling/work.hpp"

namespace fastembed::pooling {

namespace {

Kernels::Reduce reduce_for(const Kernels& kernels, Mode mode, DType dtype) {
  const auto* by_dtype = mode == Mode::max            ? kernels.max
                         : mode == Mode::weightedmean ? kernels.weighted_sum
                                                      : kernels.sum;
  return by_dtype[static_cast<int>(dtype)];
}

int64_t columns_of(const Exit& exit) { return exit.prefixes.back().dim; }

struct Call {
  const std::vector<Exit>& exits;
  const std::vector<State>& states;
  const TokenPlan& plan;
  int64_t sequences;
  int64_t rows;  // of all exits
  DType dtype;
  bool normalize;
  int team;
  Kernels::Reduce reduce;
  Kernels::MaxAndWinner max_and_winner;
  Kernels::Write write;

  Tokens tokens_of(int64_t row) const {
    return fastembed::pooling::tokens_of(exits[row / sequences], plan[row % sequences], row % sequences, dtype);
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

void run_ranges(const Call& call, const Cut& cut, int64_t rows, int64_t most_columns, int threads) {
  const std::unique_ptr<float[]> pooled(new float[rows * most_columns]);
  cut.run(
      threads, [&](int64_t row) { return columns_of(call.exits[row / call.sequences]); },
      [&](int64_t row, int64_t first, int64_t columns) {
        call.reduce_range(row, first, columns, pooled.get() + row * most_columns + first);
      },
      [&](int64_t row) { call.write_row(row, pooled.get() + row * most_columns); });
}

}  // namespace

void pool_exits(std::vector<Exit> exits, const std::vector<State>& states, const Batch& batch, Mode mode, DType dtype,
                OutputType out_type, bool normalize, int threads) {
  const TokenPlan plan(batch, mode);
  int64_t most_columns = 0, all_columns = 0;
  sort_prefixes(exits);
  for (const Exit& exit : exits) {
    most_columns = std::max(most_columns, columns_of(exit));
    all_columns += columns_of(exit);
  }
  const int64_t rows = static_cast<int64_t>(exits.size()) * batch.sequences;
  const int team = team_for(plan.tokens_to_read() * all_columns * size_of(dtype), threads);
  const Kernels& kernels = active_kernels();
  const Call call = {exits,
                     states,
                     plan,
                     batch.sequences,
                     rows,
                     dtype,
                     normalize,
                     team,
                     reduce_for(kernels, mode, dtype),
                     kernels.max_and_winner[static_cast<int>(dtype)],
                     kernels.write[static_cast<int>(out_type)]};

  const Cut cut(rows, most_columns, team);
  if (cut.whole_rows()) {
    run_whole_rows(call, rows, team);
  } else {
    run_ranges(call, cut, rows, most_columns, team);
  }
}

}  // namespace fastembed::pooling
