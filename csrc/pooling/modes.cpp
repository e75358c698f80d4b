// Several modes of every exit from one reading of it. Where a row is cut into ranges of columns, each
// holds the same columns of every mode.
#include <algorithm>
#include <memory>

#include "pooling/active_kernels.hpp"
#include "pooling/pooling.hpp"
#include "pooling/token_plan.hpp"
#include "pooling/work.hpp"

namespace fastembed::pooling {
namespace {

bool reads_one_token(Mode mode) { return mode == Mode::cls || mode == Mode::lasttoken; }

struct Call {
  const std::vector<Exit>& exits;
  const SeveralModes& several;
  const std::vector<TokenPlan>& plans;  // of each mode
  int64_t sequences;
  int64_t rows;  // of all exits
  int team;
  DType dtype;
  const Kernels& kernels;

  // Where vectors are cut short within the first mode, the rest of that mode's columns is not read.
  int64_t columns_to_read(int64_t exit) const { return std::min(several.sizes[exit], exits[exit].prefixes.back().dim); }

  Tokens tokens_of(int64_t row, const TokenPlan& plan) const {
    return fastembed::pooling::tokens_of(exits[row / sequences], plan[row % sequences], row % sequences, dtype);
  }

  Tokens tokens_after(int64_t row, const TokenPlan& plan) const {
    const int64_t next = row + team;
    const bool same_layout = next < rows && exits[next / sequences].token_stride == exits[row / sequences].token_stride;
    return same_layout ? tokens_of(next, plan) : Tokens{nullptr, 0, nullptr, 0};
  }

  // Columns [first, first + columns) of every mode's part of a row's vector.
  void reduce_range(int64_t row, int64_t first, int64_t columns, float* vector) const {
    const int64_t size = several.sizes[row / sequences];
    const TokenPlan* reading_all = nullptr;
    Several wanted = {nullptr, nullptr, nullptr};
    for (size_t m = 0; m < plans.size(); ++m) {
      float* const part = vector + m * size + first;
      if (plans[m][row % sequences].count == 0) {
        std::fill_n(part, columns, 0.f);
      } else if (reads_one_token(several.modes[m])) {
        const Tokens none = {nullptr, 0, nullptr, 0};
        kernels.sum[static_cast<int>(dtype)](tokens_of(row, plans[m]), none, first, columns, 1.f, part);
      } else {
        reading_all = &plans[m];
        float*& place = place_of(several.modes[m], wanted);
        if (place == nullptr) place = part;
      }
    }
    if (reading_all == nullptr) return;
    kernels.several[static_cast<int>(dtype)](tokens_of(row, *reading_all), tokens_after(row, *reading_all), first,
                                             columns, wanted);
    // Backwards: a sum that several modes share stands where the first of them has its part, and is divided last.
    for (size_t m = plans.size(); m-- > 0;) {
      if (reads_one_token(several.modes[m])) continue;
      const float* const undivided = place_of(several.modes[m], wanted);
      float* const part = vector + m * size + first;
      const float divisor = plans[m][row % sequences].divisor;
      for (int64_t c = 0; c < columns; ++c) part[c] = undivided[c] / divisor;
    }
  }

  static float*& place_of(Mode mode, Several& wanted) {
    if (mode == Mode::max) return wanted.max;
    return mode == Mode::weightedmean ? wanted.weighted_sum : wanted.sum;
  }
};

}  // namespace

void pool_modes(std::vector<Exit> exits, const SeveralModes& several, const Batch& batch, DType dtype,
                OutputType out_type, bool normalize, int threads) {
  std::vector<TokenPlan> plans;
  int64_t tokens_to_read = 0, most_columns = 0, all_columns = 0, largest_size = 0;
  for (const Mode mode : several.modes) {
    plans.emplace_back(batch, mode);
    tokens_to_read = std::max(tokens_to_read, plans.back().tokens_to_read());
  }
  sort_prefixes(exits);
  const int64_t rows = static_cast<int64_t>(exits.size()) * batch.sequences;
  Call call = {exits, several, plans, batch.sequences, rows, 1, dtype, active_kernels()};
  for (size_t e = 0; e < exits.size(); ++e) {
    most_columns = std::max(most_columns, call.columns_to_read(e));
    all_columns += call.columns_to_read(e);
    largest_size = std::max(largest_size, several.sizes[e]);
  }
  call.team = team_for(tokens_to_read * all_columns * size_of(dtype), threads);

  const Cut cut(rows, most_columns, call.team);
  const int64_t vector_length = static_cast<int64_t>(several.modes.size()) * largest_size;
  const std::unique_ptr<float[]> vectors(new float[rows * vector_length]);
  cut.run(
      call.team, [&](int64_t row) { return call.columns_to_read(row / batch.sequences); },
      [&](int64_t row, int64_t first, int64_t columns) {
        call.reduce_range(row, first, columns, vectors.get() + row * vector_length);
      },
      [&](int64_t row) {
        const std::vector<Prefix>& prefixes = exits[row / batch.sequences].prefixes;
        call.kernels.write[static_cast<int>(out_type)](vectors.get() + row * vector_length, prefixes.data(),
                                                       static_cast<int64_t>(prefixes.size()), row % batch.sequences,
                                                       normalize);
      });
}

}  // namespace fastembed::pooling
