#include "qmatmul/qmatmul.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "common/divide_up.hpp"
#include "common/half.hpp"
#include "common/isa.hpp"
#include "common/pages.hpp"
#include "common/threading.hpp"
#include "qmatmul/gate_table.hpp"

namespace fastembed::qmatmul {

extern const Kernels generic_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avxvnni_kernels;
extern const Kernels avx512vnni_kernels;
constexpr KernelsByIsa<Kernels> kernels{
    {&generic_kernels, &avx2_kernels, nullptr, &avx512vnni_kernels, &avxvnni_kernels}};
extern const BFloat16Kernels avx512bf16_kernels;
const BFloat16Kernels* bfloat16_kernels() { return has_avx512bf16() ? &avx512bf16_kernels : nullptr; }
#else
constexpr KernelsByIsa<Kernels> kernels{{&generic_kernels, nullptr, nullptr, nullptr}};
const BFloat16Kernels* bfloat16_kernels() { return nullptr; }
#endif

namespace {

// Quantised activations of at most this many bytes are in flight, so that they stay in the second-level cache between
// their quantisation and the last panel that reads them.
constexpr int64_t tokens_budget = int64_t{3} << 18;
// Work below which another thread costs more than it brings, in multiply-adds and in elements to quantise.
constexpr int64_t multiply_grain = int64_t{1} << 20;
constexpr int64_t quantize_grain = int64_t{1} << 15;
// A task unpacks its panel once: few rows would not pay for that.
constexpr int64_t rows_per_task = 192;
constexpr int64_t tasks_per_thread = 4;

// Memory that a thread keeps from call to call, so that large layers do not pay for fresh pages every time.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  char* at_least(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = divide_up(bytes, 64) * 64;
      data_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(size_)));
      if (data_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0;
};

int useful_threads(int64_t work, int64_t grain, int threads) {
  return team_size(std::max<int64_t>(1, work / grain), threads);
}

const char* element(const void* data, DType dtype, int64_t index) {
  return static_cast<const char*>(data) + index * size_of(dtype);
}

Steps steps_from(const Steps& steps, int64_t index) {
  const DType dtype = steps.dtype;
  const char* zeros = static_cast<const char*>(steps.zeros);
  if (zeros != nullptr) zeros += index * (steps.kind == Zeros::codes ? 1 : size_of(dtype));
  return {element(steps.scales, dtype, index), dtype, zeros, steps.kind};
}

void widen_bias(const Layer& layer, int64_t first, int64_t columns, float* bias) {
  std::memset(bias, 0, panel_width * sizeof(float));
  if (layer.bias == nullptr) return;
  const char* data = element(layer.bias, layer.bias_dtype, first);
  if (layer.bias_dtype == DType::f32) {
    std::memcpy(bias, data, columns * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < columns; ++i) bias[i] = load_scalar(data, layer.bias_dtype, i);
}

int64_t groups_of(const Layer& layer) { return divide_up(layer.in_features, layer.group_size); }
bool is_int8(const Layer& layer) { return layer.activations == Activations::int8; }
int64_t panels_of(const Layer& layer) { return divide_up(layer.out_features, panel_width); }

void fetch(const void* data, int64_t bytes) {
  const char* at = static_cast<const char*>(data);
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte);
}

// One call, seen as tasks: rows to quantise, then panels by row ranges to multiply.
class Call {
 public:
  Call(const Input& x, const Projection* projections, int64_t count, int threads)
      : kernels_(kernels.active()),
        bfloat16_kernels_(x.dtype == DType::bf16 ? bfloat16_kernels() : nullptr),
        x_(x),
        projections_(projections),
        count_(count),
        threads_(threads) {
    for (int64_t i = 0; i < count; ++i) {
      panels_ += panels_of(layer(i));
      sums_per_row_ += sums_of(layer(i));
      multiples_per_row_ += multiples_of(layer(i));
      (is_int8(layer(i)) ? any_int8_ : any_floats_) = true;
    }
  }

  void run() const {
    bool any_fresh = false;  // of the outputs, in large calls
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t bytes = x_.rows * row_bytes(i);
      ask_for_huge_pages(projections_[i].y, bytes);
      if (threads_ > 1 && bytes >= bytes_for_huge_pages) any_fresh |= is_fresh(projections_[i].y, bytes);
    }
    // An odd number of cache lines between rows keeps the rows of a tile out of each other's cache sets.
    const int64_t stride = (divide_up(in_features(), 64) | 1) * 64;
    const int64_t token_bytes = (any_floats_ ? 4 * stride : stride) + 4 * multiples_per_row_;
    const int64_t most = std::max(rows_per_task, tokens_budget / token_bytes);
    const int64_t block = divide_up(x_.rows, divide_up(x_.rows, most));
    const int64_t blocks = divide_up(x_.rows, block);
    const int team = useful_threads(block * in_features() * panels_ * panel_width, multiply_grain, threads_);
    // Of two blocks under way at a time, each has room of its own.
    const int64_t room = Activated::bytes_of(*this, block, stride), rooms = team > 1 && blocks > 1 ? 2 : 1;
    thread_local Buffer buffer;
    char* rooms_at = buffer.at_least(rooms * room);
    const Activated activated[] = {{*this, block, stride, rooms_at},
                                   {*this, block, stride, rooms_at + (rooms - 1) * room}};
    const int quantizing = useful_threads(block * in_features(), quantize_grain, threads_);
    const int64_t chunk = divide_up(block, quantizing * tasks_per_thread);
    const int64_t chunks = divide_up(block, chunk);
    const int64_t pages = any_fresh && team > 1 ? pages_of(block) : 0;
    const int64_t wanted = team == 1 ? 1 : divide_up(team * tasks_per_thread, panels_);
    const int64_t ranges = std::min(wanted, divide_up(block, rows_per_task));
    const auto rows_of = [&](int64_t round) { return Rows{round * block, std::min(block, x_.rows - round * block)}; };
    parallel_rounds(
        blocks, chunks + pages,
        [&](int64_t round, int64_t task) {
          const Rows rows = rows_of(round);
          task < chunks ? activate(rows, task * chunk, chunk, activated[round % 2]) : touch(rows, task - chunks);
        },
        panels_ * ranges,
        [&](int64_t round, int64_t task) { multiply(rows_of(round), task, ranges, team, activated[round % 2]); }, team);
  }

 private:
  struct Rows {
    int64_t first;
    int64_t count;
  };

  // Tokens as the kernels take them.
  struct Activated {
    int64_t stride;
    float* values;
    int8_t* codes;
    int32_t* multiples;  // of one projection after the other, [rows, groups, sum_multiples] or nothing
    float* scales;
    int32_t* sums;  // of one projection after the other, [rows, groups] each; float for bfloat16 tokens

    uint16_t* halves() const { return reinterpret_cast<uint16_t*>(values); }

    // In bytes_of(call, rows, stride) bytes, aligned to 64.
    Activated(const Call& call, int64_t rows, int64_t stride, char* at) : stride(stride) {
      values = reinterpret_cast<float*>(at);
      codes = reinterpret_cast<int8_t*>(values + (call.any_floats_ ? rows * stride : 0));
      multiples = reinterpret_cast<int32_t*>(codes + (call.any_int8_ ? rows * stride : 0));
      scales = reinterpret_cast<float*>(multiples + rows * call.multiples_per_row_);
      sums = reinterpret_cast<int32_t*>(scales + rows);
    }

    static int64_t bytes_of(const Call& call, int64_t rows, int64_t stride) {
      const int64_t row = (call.any_floats_ ? 4 * stride : 0) + (call.any_int8_ ? stride : 0) +
                          4 * (call.multiples_per_row_ + 1 + call.sums_per_row_);
      return divide_up(rows * row, 64) * 64;
    }
  };

  // How many group sums of a token a layer needs.
  int64_t sums_of(const Layer& layer) const {
    return is_int8(layer) || bfloat16_kernels_ != nullptr ? groups_of(layer) : 0;
  }

  // How many multiples of a token's group sums a layer needs.
  int64_t multiples_of(const Layer& layer) const {
    const bool wanted = is_int8(layer) && kernels_.wants_multiples != nullptr &&
                        kernels_.wants_multiples(layer.bits, layer.steps.kind, x_.rows);
    return wanted ? groups_of(layer) * sum_multiples : 0;
  }

  const Layer& layer(int64_t i) const { return *projections_[i].layer; }
  int64_t row_bytes(int64_t i) const { return layer(i).out_features * size_of(x_.dtype); }
  int64_t in_features() const { return layer(0).in_features; }

  // Threads that come to a fresh page together clear it each for itself, and all but one of them in vain. Panels of the
  // same rows share their pages, so these are cleared one by one beforehand.
  int64_t pages_of(int64_t rows) const {
    int64_t pages = 0;
    for (int64_t i = 0; i < count_; ++i) pages = std::max(pages, huge_pages_of(rows * row_bytes(i)));
    return pages;
  }

  void touch(const Rows& rows, int64_t page) const {
    for (int64_t i = 0; i < count_; ++i) {
      char* y = static_cast<char*>(projections_[i].y) + rows.first * row_bytes(i);
      touch_huge_page(y, rows.count * row_bytes(i), page);
    }
  }

  // `count` tokens of a block from its row `first` on, as far as there are so many.
  void activate(const Rows& rows, int64_t first, int64_t count, const Activated& to) const {
    for (int64_t row = first; row < std::min(rows.count, first + count); ++row) {
      const char* x = element(x_.data, x_.dtype, (rows.first + row) * x_.stride);
      if (any_int8_) {
        kernels_.quantize(x, x_.dtype, in_features(), to.codes + row * to.stride, to.stride, to.scales + row);
      }
      if (any_floats_ && bfloat16_kernels_ == nullptr) {
        kernels_.widen(x, x_.dtype, in_features(), to.values + row * to.stride, to.stride);
      }
      sum_groups(x, rows.count, row, to);
    }
  }

  // The group sums of a token, for every projection.
  void sum_groups(const char* x, int64_t rows, int64_t row, const Activated& to) const {
    int32_t* sums = to.sums;
    int32_t* multiples = to.multiples;
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t groups = sums_of(layer(i));
      int32_t* own = sums + row * groups;
      if (is_int8(layer(i))) {
        kernels_.sum_groups(to.codes + row * to.stride, in_features(), layer(i).group_size, own);
        const int64_t count = multiples_of(layer(i));
        if (count != 0) kernels_.multiply_sums(own, groups, multiples + row * count);
        multiples += rows * count;
      } else if (bfloat16_kernels_ != nullptr) {
        bfloat16_kernels_->copy(reinterpret_cast<const uint16_t*>(x), in_features(), layer(i).group_size,
                                to.halves() + row * to.stride, to.stride, reinterpret_cast<float*>(own));
      }
      sums += rows * groups;
    }
  }

  // One task: a panel times one of the `ranges` into which the rows of a block are cut.
  void multiply(const Rows& rows, int64_t task, int64_t ranges, int team, const Activated& from) const {
    const int64_t range = divide_up(divide_up(rows.count, ranges), 6) * 6;
    const int64_t first = task % ranges * range;
    const Rows part{rows.first + first, std::min(range, rows.count - first)};
    if (part.count <= 0) return;
    const Place place = find_panel(task / ranges);
    // Threads take the tasks in turns, roughly.
    const int64_t next = (task + team) / ranges;
    const uint8_t* next_codes = nullptr;
    if (next > task / ranges && next < panels_) {
      const Place next_place = find_panel(next);
      fetch_all_but_codes(next_place);
      next_codes = next_place.codes();
    }
    multiply_panel(place, next_codes, part, first, from, rows.count);
  }

  // A panel, and where the sums and the multiples of its projection begin.
  struct Place {
    const Projection* projection;
    int64_t panel;
    int64_t sums_before;
    int64_t multiples_before;

    const uint8_t* codes() const {
      const Layer& layer = *projection->layer;
      return layer.codes + panel * divide_up(layer.in_features, quad) * 32 * layer.bits;
    }
  };

  // Panels are counted through all projections.
  Place find_panel(int64_t panel) const {
    Place place{projections_, panel, 0, 0};
    for (; place.panel >= panels_of(*place.projection->layer); ++place.projection) {
      place.panel -= panels_of(*place.projection->layer);
      place.sums_before += sums_of(*place.projection->layer);
      place.multiples_before += multiples_of(*place.projection->layer);
    }
    return place;
  }

  // What a panel needs of its layer besides the codes is too little at a time for the processor to see it coming.
  static void fetch_all_but_codes(const Place& place) {
    const Layer& layer = *place.projection->layer;
    const int64_t count = groups_of(layer) * panel_width;
    const Steps steps = steps_from(layer.steps, place.panel * count);
    fetch(steps.scales, count * size_of(steps.dtype));
    if (steps.zeros != nullptr) fetch(steps.zeros, count * (steps.kind == Zeros::codes ? 1 : size_of(steps.dtype)));
    if (layer.bias == nullptr) return;
    const int64_t column = place.panel * panel_width;
    const int64_t columns = std::min(panel_width, layer.out_features - column);
    fetch(element(layer.bias, layer.bias_dtype, column), columns * size_of(layer.bias_dtype));
  }

  // `part` of the rows of a block, from its row `first` on.
  void multiply_panel(const Place& place, const uint8_t* next_codes, const Rows& part, int64_t first,
                      const Activated& from, int64_t block_rows) const {
    thread_local Buffer scratch;
    const Projection& projection = *place.projection;
    const Layer& layer = *projection.layer;
    const Panel panel{place.codes(),
                      steps_from(layer.steps, place.panel * groups_of(layer) * panel_width),
                      layer.bits,
                      layer.group_size / quad,
                      divide_up(layer.in_features, quad),
                      groups_of(layer),
                      next_codes};
    const int64_t column = place.panel * panel_width;
    const int64_t columns = std::min(panel_width, layer.out_features - column);
    alignas(64) float bias[panel_width];
    widen_bias(layer, column, columns, bias);
    const int64_t offset = (part.first * layer.out_features + column) * size_of(x_.dtype);
    const char* residual = static_cast<const char*>(projection.residual);
    const Output output{
        static_cast<char*>(projection.y) + offset,         x_.dtype,       layer.out_features,        columns, bias,
        residual == nullptr ? nullptr : residual + offset, layer.epilogue, gate_table(layer.epilogue)};
    const int32_t* sums = from.sums + place.sums_before * block_rows + first * sums_of(layer);
    if (is_int8(layer)) {
      const int64_t count = multiples_of(layer);
      const int32_t* multiples = from.multiples + place.multiples_before * block_rows + first * count;
      const Tokens tokens{from.codes + first * from.stride, from.stride, from.scales + first, sums, part.count,
                          count == 0 ? nullptr : multiples};
      kernels_.multiply(panel, tokens, output, scratch.at_least(kernels_.scratch_bytes(panel, part.count)));
    } else if (bfloat16_kernels_ != nullptr) {
      const BFloat16Tokens tokens{from.halves() + first * from.stride, from.stride,
                                  reinterpret_cast<const float*>(sums), part.count};
      bfloat16_kernels_->multiply(panel, tokens, output,
                                  scratch.at_least(bfloat16_kernels_->scratch_bytes(panel, part.count)));
    } else {
      const FloatTokens tokens{from.values + first * from.stride, from.stride, part.count};
      kernels_.multiply_float(panel, tokens, output, scratch.at_least(kernels_.float_scratch_bytes(panel, part.count)));
    }
  }

  const Kernels& kernels_;
  const BFloat16Kernels* const bfloat16_kernels_;  // where they serve
  const Input& x_;
  const Projection* projections_;
  const int64_t count_;
  const int threads_;
  int64_t panels_ = 0;
  int64_t sums_per_row_ = 0;
  int64_t multiples_per_row_ = 0;
  bool any_int8_ = false;
  bool any_floats_ = false;
};

}  // namespace

void qlinear(const Input& x, const Projection* projections, int64_t count, int threads) {
  const Call call(x, projections, count, threads);
  if (x.rows != 0) call.run();
}

}  // namespace fastembed::qmatmul
