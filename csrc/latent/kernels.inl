// The kernels of one level. A file *_<level>.cpp includes this inside its own anonymous namespace after defining
//   vector_bytes   of its registers
//   tile_rows      so that two accumulators per row, and what they are made of, fill the register file
// and, where the level has an instruction for it,
//   FASTEMBED_DOT_BF16(sum, x, w)       pairs of bfloat16 products
//   FASTEMBED_LOOK_UP(table, segments)  of qmatmul::gate_segments entries
// The loops that are not on vectors here are those that the compiler vectorises under the level's flags.

#define INLINE inline __attribute__((always_inline))

constexpr int lanes = vector_bytes / 4;
typedef float Vec __attribute__((vector_size(vector_bytes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(vector_bytes), aligned(4), may_alias));
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

INLINE Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
INLINE void store(float* to, Vec values) { *reinterpret_cast<Vec*>(to) = values; }

// The first `count` < lanes elements; the others are `fill`.
INLINE Vec load_some(const float* from, int64_t count, float fill) {
  Vec values = Vec{} + fill;
  for (int64_t i = 0; i < count; ++i) values[i] = from[i];
  return values;
}
INLINE void store_some(float* to, Vec values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = values[i];
}

// e^x for x <= 0; zero below -87.
INLINE Vec exponential(Vec x) {
  const Vec bounded = x > -87.f ? x : Vec{} - 87.f;
  // x = n ln 2 + r with r in [-ln 2 / 2, ln 2 / 2], ln 2 in two parts of which the first is short.
  const Ints n = __builtin_convertvector(bounded * 1.44269504f - 0.5f, Ints);
  const Vec exponent = __builtin_convertvector(n, Vec);
  const Vec r = (bounded - exponent * 0.693359375f) + exponent * 2.12194440e-4f;
  Vec power = Vec{} + 1.f / 5040;
  power = power * r + 1.f / 720;
  power = power * r + 1.f / 120;
  power = power * r + 1.f / 24;
  power = power * r + 1.f / 6;
  power = power * r + 0.5f;
  power = power * r + 1.f;
  power = power * r + 1.f;
  const Ints bits = (n + 127) << 23;
  return x > -87.f ? power * reinterpret_cast<Vec>(bits) : Vec{};
}

void softmax(float* row, int64_t count) {
  const int64_t whole = count - count % lanes, rest = count - whole;
  Vec most = load_some(row + whole, rest, row[0]);
  for (int64_t i = 0; i < whole; i += lanes) {
    const Vec values = load(row + i);
    most = values > most ? values : most;
  }
  float largest = most[0];
  for (int i = 1; i < lanes; ++i) largest = most[i] > largest ? most[i] : largest;
  for (int64_t i = 0; i < whole; i += lanes) store(row + i, exponential(load(row + i) - largest));
  if (rest > 0) store_some(row + whole, exponential(load_some(row + whole, rest, largest) - largest), rest);
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

INLINE Vec look_up(const float* table, Ints segments) {
#if defined(FASTEMBED_LOOK_UP)
  return FASTEMBED_LOOK_UP(table, segments);
#else
  Vec values;
  for (int i = 0; i < lanes; ++i) values[i] = table[segments[i]];
  return values;
#endif
}

INLINE Vec gelu(Vec x, const float* table) {
  const Vec magnitude = x < 0.f ? -x : x;
  const Vec scaled = magnitude * qmatmul::gate_segments_per_unit;
  const Vec last = Vec{} + (qmatmul::gate_segments - 1);
  const Vec position = scaled < last ? scaled : last;
  const Ints segments = __builtin_convertvector(position, Ints);
  const Vec offset = position - __builtin_convertvector(segments, Vec);
  Vec value = look_up(table + (qmatmul::gate_coefficients - 1) * qmatmul::gate_segments, segments);
  for (int k = qmatmul::gate_coefficients - 2; k >= 0; --k) {
    value = value * offset + look_up(table + k * qmatmul::gate_segments, segments);
  }
  return (x > 0.f ? x : Vec{}) - value;
}

void add_gated(const float* values, const float* gates, const float* value_bias, const float* gate_bias, int64_t count,
               const float* table, double* sums) {
  int64_t i = 0;
  float products[lanes];
  for (; i + lanes <= count; i += lanes) {
    store(products, (load(values + i) + load(value_bias + i)) * gelu(load(gates + i) + load(gate_bias + i), table));
    for (int k = 0; k < lanes; ++k) sums[i + k] += products[k];
  }
  const int64_t rest = count - i;
  if (rest == 0) return;
  const Vec gate = load_some(gates + i, rest, 0.f) + load_some(gate_bias + i, rest, 0.f);
  store(products, (load_some(values + i, rest, 0.f) + load_some(value_bias + i, rest, 0.f)) * gelu(gate, table));
  for (int64_t k = 0; k < rest; ++k) sums[i + k] += products[k];
}

void add_row(const float* row, int64_t count, double* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += row[i];
}

constexpr Kernels table = {tile_rows, normalize, softmax, pack, multiply, add_gated, add_row};
