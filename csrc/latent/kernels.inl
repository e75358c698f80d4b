// The kernels of one level. A file *_<level>.cpp includes this inside its own anonymous namespace after defining
//   vector_bytes   of its registers
//   tile_rows      so that two accumulators per row, and what they are made of, fill the register file
// and FASTEMBED_DOT_BF16(sum, x, w) where the level has an instruction for pairs of bfloat16 products.
// The loops outside `multiply` are written for the compiler to vectorise under the level's flags.

#define INLINE inline __attribute__((always_inline))

constexpr int lanes = vector_bytes / 4;
typedef float Vec __attribute__((vector_size(vector_bytes), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(vector_bytes), aligned(4), may_alias));

// Partial sums that do not depend on the width of the registers.
constexpr int64_t partials = 16;

INLINE double sum_of(const double* values, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += values[i];
  return total;
}

// Two passes, in double precision: hidden states have channels thousands of times larger than the rest.
bool normalize(const float* row, int64_t features, float eps, float* normalized) {
  double sums[partials] = {};
  int64_t c = 0;
  for (; c + partials <= features; c += partials) {
    for (int64_t i = 0; i < partials; ++i) sums[i] += row[c + i];
  }
  for (; c < features; ++c) sums[0] += row[c];
  const double mean = sum_of(sums, partials) / features;
  for (double& sum : sums) sum = 0;
  for (c = 0; c + partials <= features; c += partials) {
    for (int64_t i = 0; i < partials; ++i) {
      const double centred = row[c + i] - mean;
      sums[i] += centred * centred;
    }
  }
  for (; c < features; ++c) sums[0] += (row[c] - mean) * (row[c] - mean);
  const double variance = sum_of(sums, partials) / features;
  const bool finite = variance - variance == 0;
  const double inverse = finite ? 1 / __builtin_sqrt(variance + eps) : 0;
  for (c = 0; c < features; ++c) normalized[c] = finite ? static_cast<float>((row[c] - mean) * inverse) : 0.f;
  return finite;
}

// e^x for x <= 0; zero below -87.
INLINE float exponential(float x) {
  const float bounded = x > -87.f ? x : -87.f;
  // x = n ln 2 + r with r in [-ln 2 / 2, ln 2 / 2], ln 2 in two parts of which the first is short.
  const int n = static_cast<int>(bounded * 1.44269504f - 0.5f);
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float power = 1.f / 5040;
  power = power * r + 1.f / 720;
  power = power * r + 1.f / 120;
  power = power * r + 1.f / 24;
  power = power * r + 1.f / 6;
  power = power * r + 0.5f;
  power = power * r + 1.f;
  power = power * r + 1.f;
  float scale;
  const int bits = (n + 127) << 23;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return x > -87.f ? power * scale : 0.f;
}

void softmax(float* row, int64_t count) {
  float largest = row[0];
  for (int64_t i = 1; i < count; ++i) largest = row[i] > largest ? row[i] : largest;
  for (int64_t i = 0; i < count; ++i) row[i] = exponential(row[i] - largest);
  double sums[partials] = {};
  int64_t i = 0;
  for (; i + partials <= count; i += partials) {
    for (int64_t k = 0; k < partials; ++k) sums[k] += row[i + k];
  }
  for (; i < count; ++i) sums[0] += row[i];
  const float inverse = static_cast<float>(1 / sum_of(sums, partials));
  for (i = 0; i < count; ++i) row[i] *= inverse;
}

INLINE uint32_t bf16_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// float32: [features, tile_rows]; bfloat16: [ceil(features / 2), tile_rows, 2].
void pack(const float* rows, int64_t stride, int64_t count, int64_t features, DType dtype, void* packed) {
  if (dtype == DType::f32) {
    float* to = static_cast<float*>(packed);
    for (int64_t k = 0; k < features; ++k) {
      for (int64_t r = 0; r < tile_rows; ++r) *to++ = r < count ? rows[r * stride + k] : 0.f;
    }
    return;
  }
  uint32_t* to = static_cast<uint32_t*>(packed);
  for (int64_t k = 0; k < features; k += 2) {
    for (int64_t r = 0; r < tile_rows; ++r) {
      const float* row = rows + r * stride + k;
      const uint32_t high = r < count && k + 1 < features ? bf16_bits(row[1]) : 0;
      *to++ = r < count ? high << 16 | bf16_bits(row[0]) : 0;
    }
  }
}

struct Float {
  using Element = float;
  static INLINE void step(Vec (&sums)[tile_rows][2], const float* x, const float* low, const float* high) {
    const Vec w[2] = {*reinterpret_cast<const Vec*>(low), *reinterpret_cast<const Vec*>(high)};
#pragma GCC unroll 16
    for (int r = 0; r < tile_rows; ++r) {
      sums[r][0] += w[0] * x[r];
      sums[r][1] += w[1] * x[r];
    }
  }
};

struct BFloat16Pair {
  using Element = uint32_t;
#if defined(FASTEMBED_DOT_BF16)
  static INLINE Vec dot(Vec sum, uint32_t x, Bits w) { return FASTEMBED_DOT_BF16(sum, x, w); }
#else
  static INLINE float widen(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
  static INLINE Vec dot(Vec sum, uint32_t x, Bits w) {
    sum += reinterpret_cast<Vec>(w << 16) * widen(x << 16);
    return sum + reinterpret_cast<Vec>(w & 0xffff0000u) * widen(x & 0xffff0000u);
  }
#endif
  static INLINE void step(Vec (&sums)[tile_rows][2], const uint32_t* x, const uint32_t* low, const uint32_t* high) {
    const Bits w[2] = {*reinterpret_cast<const Bits*>(low), *reinterpret_cast<const Bits*>(high)};
#pragma GCC unroll 16
    for (int r = 0; r < tile_rows; ++r) {
      sums[r][0] = dot(sums[r][0], x[r], w[0]);
      sums[r][1] = dot(sums[r][1], x[r], w[1]);
    }
  }
};

// Columns are taken in two vectors, one from each half of the panel.
template <class Product>
void multiply_as(const typename Product::Element* packed, const typename Product::Element* panel, int64_t steps,
                 int64_t steps_per_chain, float* products) {
  for (int64_t column = 0; column < half_panel; column += lanes) {
    for (int64_t first = 0; first < steps; first += steps_per_chain) {
      const int64_t end = first + steps_per_chain < steps ? first + steps_per_chain : steps;
      const auto* x = packed + first * tile_rows;
      const auto* w = panel + first * panel_width + column;
      Vec sums[tile_rows][2] = {};
      for (int64_t k = first; k < end; ++k, x += tile_rows, w += panel_width) {
        Product::step(sums, x, w, w + half_panel);
      }
#pragma GCC unroll 16
      for (int r = 0; r < tile_rows; ++r) {
        for (int t = 0; t < 2; ++t) {
          Vec* to = reinterpret_cast<Vec*>(products + r * panel_width + t * half_panel + column);
          *to = first == 0 ? sums[r][t] : *to + sums[r][t];
        }
      }
    }
  }
}

void multiply(const void* packed, const void* panel, int64_t features, DType dtype, float* products) {
  if (dtype == DType::f32) {
    multiply_as<Float>(static_cast<const float*>(packed), static_cast<const float*>(panel), features, chain, products);
  } else {
    multiply_as<BFloat16Pair>(static_cast<const uint32_t*>(packed), static_cast<const uint32_t*>(panel),
                              (features + 1) / 2, chain / 2, products);
  }
}

INLINE float gelu(float x, const float* table) {
  const float magnitude = x < 0.f ? -x : x;
  const float scaled = magnitude * qmatmul::gate_segments_per_unit;
  const float position = scaled < qmatmul::gate_segments - 1 ? scaled : qmatmul::gate_segments - 1;
  const int segment = static_cast<int>(position);
  const float offset = position - segment;
  float value = table[(qmatmul::gate_coefficients - 1) * qmatmul::gate_segments + segment];
  for (int k = qmatmul::gate_coefficients - 2; k >= 0; --k) {
    value = value * offset + table[k * qmatmul::gate_segments + segment];
  }
  return (x > 0.f ? x : 0.f) - value;
}

void add_gated(const float* values, const float* gates, const float* value_bias, const float* gate_bias, int64_t count,
               const float* table, double* sums) {
  for (int64_t i = 0; i < count; ++i) {
    sums[i] += (values[i] + value_bias[i]) * gelu(gates[i] + gate_bias[i], table);
  }
}

void add_row(const float* row, int64_t count, double* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += row[i];
}

constexpr Kernels table = {tile_rows, normalize, softmax, pack, multiply, add_gated, add_row};
