// The way back: every gradient is written once, in order, whole tokens at a time. Nothing of the hidden states is read.
#include <algorithm>
#include <memory>

#include "common/divide_up.hpp"
#include "common/half.hpp"
#include "common/pages.hpp"
#include "common/threading.hpp"
#include "pooling/active_kernels.hpp"
#include "pooling/pooling.hpp"
#include "pooling/token_plan.hpp"
#include "pooling/work.hpp"

namespace fastembed::pooling {
namespace {

// Writing less than this per thread takes less time than waking one.
constexpr int64_t bytes_per_thread = 256 << 10;
// Gradients larger than this would push everything else out of the last-level cache, and be gone from it themselves
// before they are read.
constexpr int64_t bytes_to_stream = 16 << 20;

int64_t columns_of(const ExitGradient& exit) { return exit.prefixes.back().dim; }

struct Call {
  const std::vector<ExitGradient>& exits;
  const TokenPlan& plan;
  int64_t sequences;
  int64_t padded_tokens;  // of every sequence; 0 when packed
  Mode mode;
  DType dtype;
  const std::vector<bool>& streams;  // by exit: whether to write past the caches
  const Kernels& kernels;

  // The gradient of tokens [begin, end) of a row's sequence, from that of their sum.
  void write_tokens(int64_t row, int64_t begin, int64_t end, const float* grad) const {
    const ExitGradient& exit = exits[row / sequences];
    const TokenPlan::Sequence& sequence = plan[row % sequences];
    const int64_t token_bytes = exit.size * size_of(dtype);
    char* const data = static_cast<char*>(exit.data) + (row % sequences * padded_tokens + sequence.start) * token_bytes;
    const int64_t columns = columns_of(exit);
    const Kernels::TokenBackward write = kernels.token_backward[static_cast<int>(dtype)];
    const bool is_max = mode == Mode::max, stream = streams[row / sequences];
    const int64_t* const valid_end = sequence.index + (is_max ? 0 : sequence.count);
    const int64_t* valid = std::lower_bound(sequence.index, valid_end, begin);
    for (int64_t t = begin; t < end; ++t) {
      const bool is_valid = valid < valid_end && *valid == t;
      const bool weighted = is_valid && mode == Mode::weightedmean;
      const float weight = weighted ? static_cast<float>(t - sequence.index[0] + 1) : 1.f;
      write(grad, weight, is_valid ? columns : 0, exit.size, stream, data + t * token_bytes);
      valid += is_valid;
    }
    if (stream) kernels.settle();
    if (is_max)
      write_winners(exit.state.winner + row % sequences * columns, columns, begin, end, grad, data, exit.size);
  }

  void write_winners(const int32_t* winner, int64_t columns, int64_t begin, int64_t end, const float* grad, void* data,
                     int64_t size) const {
    for (int64_t c = 0; c < columns; ++c) {
      if (begin <= winner[c] && winner[c] < end) store_scalar(data, dtype, winner[c] * size + c, grad[c]);
    }
  }
};

}  // namespace

void pool_exits_backward(std::vector<ExitGradient> exits, const Batch& batch, Mode mode, DType dtype,
                         DType prefix_dtype, bool normalize, int threads) {
  const TokenPlan plan(batch, mode);
  int64_t most_columns = 0, all_sizes = 0, longest = 0;
  for (ExitGradient& exit : exits) {
    std::sort(exit.prefixes.begin(), exit.prefixes.end(), [](auto& a, auto& b) { return a.dim < b.dim; });
    most_columns = std::max(most_columns, columns_of(exit));
    all_sizes += exit.size;
  }
  for (int64_t b = 0; b < batch.sequences; ++b) longest = std::max(longest, plan[b].length);
  const bool packed = batch.offsets != nullptr;
  const int64_t rows_of_tokens = (packed ? 1 : batch.sequences) * batch.tokens;
  const int64_t bytes = rows_of_tokens * all_sizes * size_of(dtype);
  std::vector<bool> streams;
  for (const ExitGradient& exit : exits) {
    const int64_t bytes_of_exit = rows_of_tokens * exit.size * size_of(dtype);
    // What the system has just cleared is in the caches: writing past them would cost twice the traffic.
    streams.push_back(bytes > bytes_to_stream && !is_fresh(exit.data, bytes_of_exit));
    ask_for_huge_pages(exit.data, bytes_of_exit);
  }
  const int team = team_size(1 + bytes / bytes_per_thread, threads);
  const Kernels& kernels = active_kernels();
  const Call call = {exits, plan, batch.sequences, packed ? 0 : batch.tokens, mode, dtype, streams, kernels};

  const int64_t rows = static_cast<int64_t>(exits.size()) * batch.sequences;
  const std::unique_ptr<float[]> grads(new float[rows * most_columns]);
  parallel_for(rows, team, [&](int64_t row) {
    const ExitGradient& exit = exits[row / batch.sequences];
    const int64_t sequence = row % batch.sequences, columns = columns_of(exit);
    kernels.prefixes_backward[static_cast<int>(prefix_dtype)](
        exit.state.pooled + sequence * columns, exit.prefixes.data(), static_cast<int64_t>(exit.prefixes.size()),
        sequence, normalize, plan[sequence].divisor, columns, grads.get() + row * most_columns);
  });
  // Twice as many tasks as threads, so that none waits long for the last. Runs of them, because two threads that come
  // to the same fresh page at once both clear one, of which one is thrown away.
  const int64_t pieces = team == 1 || rows == 0 ? 1 : divide_up(2 * team, rows);
  const int64_t piece = divide_up(longest, pieces);
  parallel_for_in_runs(rows * pieces, team, [&](int64_t task) {
    const int64_t row = task / pieces, begin = task % pieces * piece;
    const int64_t end = std::min(begin + piece, plan[row % batch.sequences].length);
    if (begin < end) call.write_tokens(row, begin, end, grads.get() + row * most_columns);
  });
}

}  // namespace fastembed::pooling
