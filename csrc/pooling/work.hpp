// How the forward is cut into work: rows (a sequence of an exit), or ranges of their columns. Ranges exist to keep the
// accumulators in the first-level cache and to give every thread work when there are few sequences; whoever finishes
// the last range of a row writes its prefixes.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "common/divide_up.hpp"
#include "common/threading.hpp"
#include "pooling/pooling.hpp"
#include "pooling/token_plan.hpp"

namespace fastembed::pooling {

inline void sort_prefixes(std::vector<Exit>& exits) {
  for (Exit& exit : exits) {
    std::sort(exit.prefixes.begin(), exit.prefixes.end(), [](auto& a, auto& b) { return a.dim < b.dim; });
  }
}

inline int team_for(int64_t bytes, int threads) {
  // Reading less than this per thread takes less time than waking one.
  constexpr int64_t bytes_per_thread = 256 << 10;
  return team_size(1 + bytes / bytes_per_thread, threads);
}

inline Tokens tokens_of(const Exit& exit, const TokenPlan::Sequence& tokens, int64_t sequence, DType dtype) {
  const int64_t offset = sequence * exit.sequence_stride + tokens.start * exit.token_stride;
  return {static_cast<const char*>(exit.data) + offset * size_of(dtype), exit.token_stride, tokens.index, tokens.count};
}

class Cut {
 public:
  Cut(int64_t rows, int64_t most_columns, int team) : rows_(rows) {
    // Twice as many tasks as threads, so that none waits long for the last; no more ranges than are worth it.
    const int64_t for_threads = team == 1 || rows == 0 ? 1 : divide_up(2 * team, rows);
    ranges_ =
        std::max(divide_up(most_columns, max_columns), std::min(for_threads, divide_up(most_columns, min_columns)));
  }

  bool whole_rows() const { return ranges_ <= 1; }

  // Calls reduce(row, first, columns) for every range of the columns_of(row) columns of every row, and write(row) when
  // all of a row are done.
  template <class ColumnsOf, class Reduce, class Write>
  void run(int team, const ColumnsOf& columns_of, const Reduce& reduce, const Write& write) const {
    const std::unique_ptr<std::atomic<int64_t>[]> unfinished(new std::atomic<int64_t>[rows_]);
    for (int64_t row = 0; row < rows_; ++row) unfinished[row].store(ranges_, std::memory_order_relaxed);
    parallel_for(rows_ * ranges_, team, [&](int64_t task) {
      const int64_t row = task / ranges_, columns = columns_of(row);
      const int64_t per_range = divide_up(divide_up(columns, ranges_), min_columns) * min_columns;
      const int64_t first = std::min(columns, task % ranges_ * per_range);
      reduce(row, first, std::min(per_range, columns - first));
      if (unfinished[row].fetch_sub(1, std::memory_order_acq_rel) == 1) write(row);
    });
  }

 private:
  // Ranges of fewer columns than this read too little of a token at a time to run at memory speed.
  static constexpr int64_t min_columns = 64;

  int64_t rows_;
  int64_t ranges_;
};

}  // namespace fastembed::pooling
