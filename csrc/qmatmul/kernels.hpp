// What the instruction-set levels implement. Plain types only: this header is compiled under every level's flags.
#pragma once

#include <cstdint>

#include "common/dtype.hpp"

namespace fastembed::qmatmul {

// Output features are packed, and worked on, by the panel; see fastembed/reference/qmatmul.py for the layout.
constexpr int64_t panel_width = 64;
constexpr int64_t tile_width = 16;
constexpr int64_t quad = 4;  // input features per tile

// Numbered as EPILOGUES in fastembed/ops/qmatmul.py.
enum class Epilogue : int { none = 0, gelu = 1, gelu_tanh = 2, relu = 3, silu = 4 };

// Numbered as ACTIVATIONS in fastembed/ops/qmatmul.py.
enum class Activations : int { int8 = 0, floats = 1 };

// Numbered as fastembed/ops/qmatmul.py numbers them.
enum class Zeros : int {
  midpoint = 0,    // none stored: 2^(bits - 1), and 1/2 for one bit
  codes = 1,       // uint8
  fractional = 2,  // in the dtype of the scales
};

// What the codes stand for: scale * (code - zero), per group and output feature.
struct Steps {
  const void* scales;
  DType dtype;
  const void* zeros;  // null for midpoints
  Zeros kind;
};

// Weight codes of one panel.
//
// Every kernel takes an integer off the codes, exactly: the zero point where it is a stored code, and else 2^(bits -
// 1). Where that is not the whole zero point, the rest, scale * (integer - zero), multiplies the sum of the activations
// in float, after the group's products: its "shift".
struct Panel {
  const uint8_t* codes;  // [quads, 32 * bits]
  Steps steps;           // [groups, 64]
  int bits;
  int64_t group_quads;
  int64_t quads;
  int64_t groups;
  const uint8_t* next_codes;  // of the panel that comes next, to be fetched meanwhile; may be null

  // Always inlined: a copy compiled for one level must not serve another.
  __attribute__((always_inline)) int64_t quads_in(int64_t group) const {
    const int64_t rest = quads - group * group_quads;
    return rest < group_quads ? rest : group_quads;
  }
  __attribute__((always_inline)) int midpoint() const { return 1 << (bits - 1); }
  __attribute__((always_inline)) bool is_shifted() const {
    return steps.kind == Zeros::fractional || (steps.kind == Zeros::midpoint && bits == 1);
  }
};

// Activations in int8, [rows, stride], zero from in_features on.
struct Tokens {
  const int8_t* codes;
  int64_t stride;
  const float* scales;  // [rows]; NaN where the activations were not finite
  const int32_t* sums;  // [rows, groups], of the codes of a group
  int64_t rows;
  const int32_t* multiples;  // [rows, groups, sum_multiples]: 0, -1, -2, .. times the sums; or null
};

constexpr int64_t sum_multiples = 16;

// Activations in float32, [rows, stride], zero from in_features on to the end of the last quad.
struct FloatTokens {
  const float* values;
  int64_t stride;
  int64_t rows;
};

// Activations in bfloat16, laid out likewise, with the sums of their groups.
struct BFloat16Tokens {
  const uint16_t* values;
  int64_t stride;
  const float* sums;  // [rows, groups]
  int64_t rows;
};

// Where the outputs of one panel go: [rows, row_stride], of which this panel fills `columns` columns.
struct Output {
  void* data;
  DType dtype;
  int64_t row_stride;
  int64_t columns;
  const float* bias;     // [64], zeros where there is none
  const void* residual;  // as data, or null; added after the epilogue
  Epilogue epilogue;
  const float* gate;  // the table of `gate_table`, for the GELUs
};

struct Kernels {
  // One token to int8: codes [stride], zero from in_features on, and its scale. `codes` and the stride are multiples
  // of 64 bytes.
  void (*quantize)(const void* x, DType dtype, int64_t in_features, int8_t* codes, int64_t stride, float* scale);
  // The sums of a token's codes by group.
  void (*sum_groups)(const int8_t* codes, int64_t in_features, int64_t group_size, int32_t* sums);
  // Tokens times one panel, through bias and epilogue. `scratch` has scratch_bytes(panel, tokens.rows) bytes, aligned
  // to 64.
  void (*multiply)(const Panel& panel, const Tokens& tokens, const Output& output, void* scratch);
  int64_t (*scratch_bytes)(const Panel& panel, int64_t rows);

  // The same in floats: the activations are widened, and the weights are what `dequantize_weight` says.
  // One token to float32: [stride], zero from in_features on. The stride is a multiple of 16.
  void (*widen)(const void* x, DType dtype, int64_t in_features, float* values, int64_t stride);
  void (*multiply_float)(const Panel& panel, const FloatTokens& tokens, const Output& output, void* scratch);
  int64_t (*float_scratch_bytes)(const Panel& panel, int64_t rows);

  // Whether `multiply` needs the multiples of the sums, and what computes them: null at levels that never do.
  bool (*wants_multiples)(int bits, Zeros kind, int64_t rows) = nullptr;
  void (*multiply_sums)(const int32_t* sums, int64_t groups, int32_t* multiples) = nullptr;
};

// What CPUs with bfloat16 dot products do instead of the float kernels, for activations in bfloat16: the codes less
// their origin are exact in bfloat16.
struct BFloat16Kernels {
  // One token as it is, with zeros behind, and the sums of its groups.
  void (*copy)(const uint16_t* x, int64_t in_features, int64_t group_size, uint16_t* values, int64_t stride,
               float* sums);
  void (*multiply)(const Panel& panel, const BFloat16Tokens& tokens, const Output& output, void* scratch);
  int64_t (*scratch_bytes)(const Panel& panel, int64_t rows);
};

// Both GELUs are max(x, 0) - gate(|x|) with a gate that falls to zero, tabulated as polynomials of degree 4 on
// segments of equal width; the last segment, which reaches to infinity, is zero.
constexpr int gate_segments = 32;
constexpr int gate_coefficients = 5;
constexpr float gate_segments_per_unit = 16.f / 3;

// Below this a token's largest activation counts as this much, so that 127 / amax stays finite.
constexpr float smallest_amax = 0x1p-100f;

}  // namespace fastembed::qmatmul
