// Work is cut into (exit, sequence, range of columns). Ranges exist to keep the accumulators in the first-level cache
// and to give every thread work when there are few sequences; whoever finishes the last range of a row writes its
// prefixes.
#include "pooling/pooling.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>

#include "common/isa.hpp"
#include "common/threading.hpp"
#include "pooling/token_plan.hpp"

namespace fastembed::pooling {

namespace generic {
const Kernels& kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
#endif

namespace {

// Reading less than this per thread takes less time than waking one.
constexpr int64_t bytes_per_thread = 256 << 10;
// Ranges of fewer columns than this read too little of a token at a time to run at memory speed.
constexpr int64_t min_columns = 64;

const Kernels& active_kernels() {
#if defined(__x86_64__)
  static const KernelsByIsa<Kernels> by_isa = {{&generic::kernels(), &avx2::kernels(), &avx512::kernels(), nullptr}};
#else
  static const KernelsByIsa<Kernels> by_isa = {{&generic::kernels(), nullptr, nullptr, nullptr}};
#endif
  return by_isa.active();
}

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
  const TokenPlan& plan;
  int64_t sequences;
  int64_t element_size;
  bool normalize;
  Kernels::Reduce reduce;
  Kernels::Write write;

  void reduce_range(int64_t row, int64_t first, int64_t columns, float* pooled) const {
    const Exit& exit = exits[row / sequences];
    const int64_t sequence = row % sequences;
    const TokenPlan::Sequence& tokens = plan[sequence];
    if (tokens.count == 0) {
      std::fill_n(pooled, columns, 0.f);
      return;
    }
    const int64_t offset = sequence * exit.sequence_stride + tokens.start * exit.token_stride;
    const char* data = static_cast<const char*>(exit.data) + offset * element_size;
    reduce({data, exit.token_stride, tokens.index, tokens.count}, first, columns, tokens.divisor, pooled);
  }

  void write_row(int64_t row, const float* pooled) const {
    const std::vector<Prefix>& prefixes = exits[row / sequences].prefixes;
    write(pooled, prefixes.data(), static_cast<int64_t>(prefixes.size()), row % sequences, normalize);
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

void pool_exits(std::vector<Exit> exits, const Batch& batch, Mode mode, DType dtype, DType out_dtype, bool normalize,
                int threads) {
  const TokenPlan plan(batch, mode);
  int64_t most_columns = 0, all_columns = 0;
  for (Exit& exit : exits) {
    std::sort(exit.prefixes.begin(), exit.prefixes.end(), [](auto& a, auto& b) { return a.dim < b.dim; });
    most_columns = std::max(most_columns, columns_of(exit));
    all_columns += columns_of(exit);
  }
  const Kernels& kernels = active_kernels();
  const Call call = {exits,
                     plan,
                     batch.sequences,
                     size_of(dtype),
                     normalize,
                     reduce_for(kernels, mode, dtype),
                     kernels.write[static_cast<int>(out_dtype)]};

  const int64_t rows = static_cast<int64_t>(exits.size()) * batch.sequences;
  const int64_t bytes = plan.tokens_to_read() * all_columns * size_of(dtype);
  const int team = team_size(1 + bytes / bytes_per_thread, threads);
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
