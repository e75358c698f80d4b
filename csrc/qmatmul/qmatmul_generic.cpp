// Portable kernels: the panel is unpacked to signed weights, then plain loops.
#include <cmath>
#include <cstring>

#include "common/half.hpp"
#include "qmatmul/kernels.hpp"

namespace fastembed::qmatmul {
namespace generic {
namespace {

using Vec = float;
using Index = int;

Vec broadcast(float v) { return v; }
Vec sub(Vec a, Vec b) { return a - b; }
Vec mul(Vec a, Vec b) { return a * b; }
Vec divide(Vec a, Vec b) { return a / b; }
Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
Vec absolute(Vec v) { return std::fabs(v); }
Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
Vec larger(Vec a, Vec b) { return a > b ? a : b; }
Index truncate(Vec v) { return static_cast<int>(v); }
Vec widen(Index i) { return static_cast<float>(i); }
Vec power_of_two(Index i) { return std::ldexp(1.f, i); }
Vec look_up(const float* table, Index i) { return table[i]; }

#include "qmatmul/epilogue.inl"

void quantize(const void* x, DType dtype, int64_t in_features, int8_t* codes, int64_t stride, float* scale) {
  float amax = smallest_amax;
  bool finite = true;
  for (int64_t k = 0; k < in_features; ++k) {
    const float magnitude = std::fabs(load_scalar(x, dtype, k));
    finite = finite && std::isfinite(magnitude);
    amax = larger(magnitude, amax);
  }
  const float inverse = 127.f / amax;
  *scale = finite ? amax * (1.f / 127.f) : NAN;
  std::memset(codes, 0, static_cast<size_t>(stride));
  for (int64_t k = 0; finite && k < in_features; ++k) {
    codes[k] = static_cast<int8_t>(std::nearbyint(load_scalar(x, dtype, k) * inverse));
  }
}

void sum_groups(const int8_t* codes, int64_t in_features, int64_t group_size, int32_t* sums) {
  for (int64_t first = 0; first < in_features; first += group_size) {
    const int64_t end = first + group_size < in_features ? first + group_size : in_features;
    int32_t sum = 0;
    for (int64_t k = first; k < end; ++k) sum += codes[k];
    *sums++ = sum;
  }
}

// Eight codes of `bits` bits to eight bytes, by halving the fields three times.
uint64_t spread(uint64_t word, int bits) {
  const int gap = 8 - bits;
  const uint64_t fields = (uint64_t{1} << bits) - 1;
  const uint64_t pairs = fields | fields << bits;
  const uint64_t fours = pairs | pairs << 2 * bits;
  word = (word & fours) | (word << 4 * gap & fours << 32);
  word = (word & pairs * 0x0000000100000001) | (word << 2 * gap & pairs * 0x0001000000010000);
  return (word & fields * 0x0001000100010001) | (word << gap & fields * 0x0100010001000100);
}

// Signed weights [64] of input feature `k`, in units of their scale.
void unpack_feature(const Panel& panel, int64_t k, int16_t* weights) {
  const int64_t group = k / (panel.group_quads * quad);
  const uint8_t* codes = static_cast<const uint8_t*>(panel.steps.zeros);
  const uint8_t* words = panel.codes + k / quad * 32 * panel.bits;
  for (int64_t column = 0; column < panel_width; column += 2) {
    uint64_t word = 0;
    for (int i = 0; i < panel.bits; ++i) word |= static_cast<uint64_t>(*words++) << 8 * i;
    word = spread(word, panel.bits) >> 8 * (k % quad);
    weights[column] = static_cast<int16_t>(word & 0xff);
    weights[column + 1] = static_cast<int16_t>(word >> 32 & 0xff);
  }
  for (int64_t column = 0; column < panel_width; ++column) {
    const int zero = panel.steps.kind == Zeros::codes ? codes[group * panel_width + column] : panel.midpoint();
    weights[column] = static_cast<int16_t>(weights[column] - zero);
  }
}

// The sums of one token [64] to its outputs.
void finish(const float* sums, float scale, int64_t row, const Output& output) {
  for (int64_t i = 0; i < output.columns; ++i) {
    const int64_t index = row * output.row_stride + i;
    float y = apply_epilogue(sums[i] * scale + output.bias[i], output);
    if (output.residual != nullptr) y += load_scalar(output.residual, output.dtype, index);
    store_scalar(output.data, output.dtype, index, y);
  }
}

float zero_point(const Panel& panel, int64_t index) {
  return panel.steps.kind == Zeros::fractional ? load_scalar(panel.steps.zeros, panel.steps.dtype, index) : 0.5f;
}

float shift(const Panel& panel, float scale, int64_t index) {
  return scale * (static_cast<float>(panel.midpoint()) - zero_point(panel, index));
}

void multiply(const Panel& panel, const Tokens& tokens, const Output& output, void* scratch) {
  int16_t* weights = static_cast<int16_t*>(scratch);
  for (int64_t k = 0; k < panel.quads * quad; ++k) unpack_feature(panel, k, weights + k * panel_width);
  for (int64_t row = 0; row < tokens.rows; ++row) {
    const int8_t* codes = tokens.codes + row * tokens.stride;
    float total[panel_width] = {};
    for (int64_t group = 0; group < panel.groups; ++group) {
      int32_t dot[panel_width] = {};
      const int64_t first = group * panel.group_quads * quad;
      for (int64_t k = first; k < first + panel.quads_in(group) * quad; ++k) {
        for (int64_t i = 0; i < panel_width; ++i) dot[i] += codes[k] * weights[k * panel_width + i];
      }
      const float sum = static_cast<float>(tokens.sums[row * panel.groups + group]);
      for (int64_t i = 0; i < panel_width; ++i) {
        const float scale = load_scalar(panel.steps.scales, panel.steps.dtype, group * panel_width + i);
        total[i] += static_cast<float>(dot[i]) * scale;
        if (panel.is_shifted()) total[i] += sum * shift(panel, scale, group * panel_width + i);
      }
    }
    finish(total, tokens.scales[row], row, output);
  }
}

int64_t scratch_bytes(const Panel& panel, int64_t) {
  return panel.quads * quad * panel_width * static_cast<int64_t>(sizeof(int16_t));
}

void widen(const void* x, DType dtype, int64_t in_features, float* values, int64_t stride) {
  for (int64_t k = 0; k < stride; ++k) values[k] = k < in_features ? load_scalar(x, dtype, k) : 0.f;
}

// A block's products are summed on their own before they join the sums, which keeps rounding errors low in long rows.
constexpr int64_t block_features = 128;

// Weights of one output feature in floats, for as many input features as a block has.
void unpack_floats(const Panel& panel, int64_t first, int64_t count, float* weights) {
  int16_t integers[panel_width];
  for (int64_t k = 0; k < count; ++k) {
    unpack_feature(panel, first + k, integers);
    const int64_t group = (first + k) / (panel.group_quads * quad);
    for (int64_t i = 0; i < panel_width; ++i) {
      const int64_t index = group * panel_width + i;
      const float scale = load_scalar(panel.steps.scales, panel.steps.dtype, index);
      float weight = static_cast<float>(integers[i]);
      if (panel.is_shifted()) weight = weight + static_cast<float>(panel.midpoint()) - zero_point(panel, index);
      weights[k * panel_width + i] = scale * weight;
    }
  }
}

void multiply_float(const Panel& panel, const FloatTokens& tokens, const Output& output, void* scratch) {
  float* weights = static_cast<float*>(scratch);
  float* totals = weights + block_features * panel_width;
  std::memset(totals, 0, static_cast<size_t>(tokens.rows * panel_width) * sizeof *totals);
  const int64_t features = panel.quads * quad;
  for (int64_t first = 0; first < features; first += block_features) {
    const int64_t count = features - first < block_features ? features - first : block_features;
    unpack_floats(panel, first, count, weights);
    for (int64_t row = 0; row < tokens.rows; ++row) {
      const float* x = tokens.values + row * tokens.stride + first;
      float sums[panel_width] = {};
      for (int64_t k = 0; k < count; ++k) {
        for (int64_t i = 0; i < panel_width; ++i) sums[i] += x[k] * weights[k * panel_width + i];
      }
      for (int64_t i = 0; i < panel_width; ++i) totals[row * panel_width + i] += sums[i];
    }
  }
  for (int64_t row = 0; row < tokens.rows; ++row) finish(totals + row * panel_width, 1.f, row, output);
}

int64_t float_scratch_bytes(const Panel&, int64_t rows) {
  return (block_features + rows) * panel_width * static_cast<int64_t>(sizeof(float));
}

}  // namespace
}  // namespace generic

extern const Kernels generic_kernels;
const Kernels generic_kernels = {generic::quantize,           generic::sum_groups, generic::multiply,
                                 generic::scratch_bytes,      generic::widen,      generic::multiply_float,
                                 generic::float_scratch_bytes};

}  // namespace fastembed::qmatmul
