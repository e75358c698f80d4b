// The quantisers of scalar codes. All in float64: a code is decided by what the vector is, not by rounding on the way.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "common/first.hpp"
#include "common/half.hpp"
#include "common/threading.hpp"
#include "search/scalar_codes.hpp"

namespace fastembed::search {
namespace {

// Memory to encode one vector in.
struct Scratch {
  struct Breakpoint {
    double scale;
    int64_t dim;
    bool operator<(const Breakpoint& other) const { return scale < other.scale; }
  };

  explicit Scratch(int64_t dim) : values(dim), magnitudes(dim), steps(dim), codes(dim) { breakpoints.reserve(2 * dim); }

  std::vector<double> values, magnitudes;
  std::vector<int> steps, codes;
  std::vector<Breakpoint> breakpoints;
};

struct Interval {
  double lower, step;
};

// ---- the vector to encode ----

void load(const void* x, DType dtype, int64_t first, std::vector<double>& values) {
  for (size_t d = 0; d < values.size(); ++d) {
    const int64_t at = first + static_cast<int64_t>(d);
    switch (dtype) {
      case DType::f32:
        values[d] = static_cast<const float*>(x)[at];
        break;
      case DType::bf16:
        values[d] = bf16_to_float(static_cast<const uint16_t*>(x)[at]);
        break;
      case DType::f16:
        values[d] = f16_to_float(static_cast<const uint16_t*>(x)[at]);
        break;
    }
  }
}

double sum_of_squares(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value * value;
  return sum;
}

// The orthonormal Walsh-Hadamard transform of a power of two of values.
void hadamard(double* values, int64_t count) {
  for (int64_t half = 1; half < count; half *= 2) {
    for (int64_t first = 0; first < count; first += 2 * half) {
      for (int64_t i = first; i < first + half; ++i) {
        const double a = values[i], b = values[i + half];
        values[i] = a + b;
        values[i + half] = a - b;
      }
    }
  }
  const double scale = 1 / std::sqrt(static_cast<double>(count));
  for (int64_t i = 0; i < count; ++i) values[i] *= scale;
}

// Rounds of random signs and a Hadamard transform of as many dims as are a power of two, the first and the last ones
// in turn; halves of the vector are mixed after each where there are more (a step of Kac's walk).
void rotate(std::vector<double>& values, const uint8_t* signs) {
  const auto dim = static_cast<int64_t>(values.size());
  int64_t block = 1;
  while (2 * block <= dim) block *= 2;
  for (int64_t round = 0; round < rotation_rounds; ++round) {
    for (int64_t d = 0; d < dim; ++d) values[d] = signs[round * dim + d] != 0 ? -values[d] : values[d];
    hadamard(values.data() + (round % 2 == 0 ? 0 : dim - block), block);
    if (block == dim) continue;
    const int64_t half = dim / 2;
    const double scale = std::sqrt(0.5);
    for (int64_t i = 0; i < half; ++i) {
      double &a = values[i], &b = values[dim - half + i];
      const double sum = (a + b) * scale, difference = (a - b) * scale;
      a = sum;
      b = difference;
    }
  }
}

// ---- RaBitQ ----

// Of the codes that round scaled magnitudes down to 0 .. most, standing for half a step more each, the inner product
// with the magnitudes and the squared norm.
struct Alignment {
  double product = 0, squares = 0;
  double cosine() const { return product / std::sqrt(squares); }
};

int steps_at(double scale, double magnitude, int most) {
  return static_cast<int>(std::min(scale * magnitude, static_cast<double>(most)));
}

Alignment alignment_at(double scale, const std::vector<double>& magnitudes, int most) {
  Alignment alignment;
  for (const double magnitude : magnitudes) {
    const double level = steps_at(scale, magnitude, most) + 0.5;
    alignment.product += magnitude * level;
    alignment.squares += level * level;
  }
  return alignment;
}

// Sets `steps` to the codes of largest cosine. Codes change at the scales where a magnitude reaches another whole
// number. Grids narrow the scales down until few of those are left, all of which are tried in order: from the start,
// where magnitudes have one or none.
void best_steps(Scratch& scratch, int most) {
  const std::vector<double>& magnitudes = scratch.magnitudes;
  const auto dim = static_cast<int64_t>(magnitudes.size());
  constexpr int intervals = 16;
  double mean = 0;
  for (const double magnitude : magnitudes) mean += magnitude;
  mean /= static_cast<double>(dim);
  double low = 0, high = most <= 1 ? std::numeric_limits<double>::infinity() : (most + 1) / mean;
  const auto changes = [&] {
    int64_t count = 0;
    for (const double magnitude : magnitudes) {
      if (magnitude > 0) count += steps_at(high, magnitude, most) - steps_at(low, magnitude, most);
    }
    return count;
  };
  while (changes() > 2 * dim) {
    int best = 0;
    double largest = -1;
    const double width = (high - low) / intervals;
    for (int i = 0; i <= intervals; ++i) {
      const double cosine = alignment_at(low + i * width, magnitudes, most).cosine();
      if (cosine > largest) {
        largest = cosine;
        best = i;
      }
    }
    const double start = low;
    low = start + std::max(best - 1, 0) * width;
    high = start + std::min(best + 1, intervals) * width;
  }

  scratch.breakpoints.clear();
  for (int64_t d = 0; d < dim; ++d) {
    if (magnitudes[d] <= 0) continue;
    for (int j = steps_at(low, magnitudes[d], most) + 1; j <= steps_at(high, magnitudes[d], most); ++j) {
      scratch.breakpoints.push_back({j / magnitudes[d], d});
    }
  }
  std::sort(scratch.breakpoints.begin(), scratch.breakpoints.end());
  std::vector<int>& steps = scratch.steps;
  for (int64_t d = 0; d < dim; ++d) steps[d] = steps_at(low, magnitudes[d], most);
  Alignment alignment = alignment_at(low, magnitudes, most);
  double largest = alignment.cosine();
  size_t taken = 0;
  for (size_t i = 0; i < scratch.breakpoints.size(); ++i) {
    const int64_t d = scratch.breakpoints[i].dim;
    alignment.product += magnitudes[d];
    alignment.squares += 2 * ++steps[d];
    if (alignment.cosine() > largest) {
      largest = alignment.cosine();
      taken = i + 1;
    }
  }
  for (size_t i = taken; i < scratch.breakpoints.size(); ++i) --steps[scratch.breakpoints[i].dim];
}

// Gao and Long, SIGMOD 2024 (1 bit); Gao et al., SIGMOD 2025 (more). The vector r stands for |r|^2 / <r, w> w with
// w = c - (2^bits - 1) / 2, so that its inner product with r is |r|^2, and with others is estimated without bias.
Interval rabitq(Scratch& scratch, int bits) {
  const std::vector<double>& values = scratch.values;
  for (size_t d = 0; d < values.size(); ++d) scratch.magnitudes[d] = std::abs(values[d]);
  const double squares = sum_of_squares(values);
  if (squares == 0) {
    std::fill(scratch.codes.begin(), scratch.codes.end(), 0);
    return {0, 0};
  }
  const int half = 1 << (bits - 1);
  if (bits > 1) best_steps(scratch, half - 1);  // else there are none
  double product = 0;
  for (size_t d = 0; d < values.size(); ++d) {
    product += scratch.magnitudes[d] * (scratch.steps[d] + 0.5);
    // Below zero all bits turned over. Without a branch: signs are as good as random.
    const int turned = static_cast<int>(values[d] > 0) - 1;
    scratch.codes[d] = ((half + scratch.steps[d]) ^ turned) & (2 * half - 1);
  }
  const double step = squares / product;
  return {step * (0.5 - half), step};
}

// ---- optimised scalar quantisation ----

// Ends of the intervals of least squared error for a normal source of mean 0 and variance 1, by bits.
constexpr double normal_interval[] = {0, 0.798, 1.493, 2.051, 2.514, 2.916, 3.278, 3.611, 3.922};
constexpr int most_refined_bits = 8;
// How much of the loss is the error across the vector, the rest being that along it; and how often it is lowered.
constexpr double isotropic = 0.1;
constexpr int refinements = 5;

double position(double value, double lower, double upper, int most) {
  return std::floor((std::clamp(value, lower, upper) - lower) * (most / (upper - lower)) + 0.5);
}

double interval_loss(const std::vector<double>& values, double lower, double upper, int most, double squares) {
  const double step = (upper - lower) / most;
  double along = 0, error = 0;
  for (const double value : values) {
    const double off = value - (lower + step * position(value, lower, upper, most));
    along += value * off;
    error += off * off;
  }
  return (1 - isotropic) * along * along / squares + isotropic * error;
}

// Lucene's OptimizedScalarQuantizer: an interval for each vector, lowered in a loss that weighs the error along the
// vector more, by turns of assigning values to grid points and solving for the ends.
Interval optimised(Scratch& scratch, int bits) {
  const std::vector<double>& values = scratch.values;
  const auto dim = static_cast<double>(values.size());
  const int most = (1 << bits) - 1;
  double sum = 0;
  for (const double value : values) sum += value;
  const double squares = sum_of_squares(values), mean = sum / dim;
  double spread = 0;
  for (const double value : values) spread += (value - mean) * (value - mean);
  spread = std::sqrt(spread / dim);
  const auto [smallest, largest] = std::minmax_element(values.begin(), values.end());
  double lower = *smallest, upper = *largest;
  if (bits <= most_refined_bits) {
    lower = std::clamp(mean - normal_interval[bits] * spread, *smallest, *largest);
    upper = std::clamp(mean + normal_interval[bits] * spread, *smallest, *largest);
  }
  if (!(upper > lower)) {
    std::fill(scratch.codes.begin(), scratch.codes.end(), 0);
    return {lower, 0};
  }
  double loss = interval_loss(values, lower, upper, most, squares);
  for (int round = 0; round < refinements && bits <= most_refined_bits; ++round) {
    double aa = 0, ab = 0, bb = 0, ax = 0, bx = 0;
    for (const double value : values) {
      const double s = position(value, lower, upper, most) / most;
      aa += (1 - s) * (1 - s);
      ab += (1 - s) * s;
      bb += s * s;
      ax += value * (1 - s);
      bx += value * s;
    }
    const double scale = (1 - isotropic) / squares;
    const double m0 = scale * ax * ax + isotropic * aa, m1 = scale * ax * bx + isotropic * ab,
                 m2 = scale * bx * bx + isotropic * bb;
    const double determinant = m0 * m2 - m1 * m1;
    if (determinant == 0) break;
    const double a = (m2 * ax - m1 * bx) / determinant, b = (m0 * bx - m1 * ax) / determinant;
    if (!(b > a) || (std::abs(a - lower) < 1e-8 && std::abs(b - upper) < 1e-8)) break;
    const double refined = interval_loss(values, a, b, most, squares);
    if (refined > loss) break;
    lower = a;
    upper = b;
    loss = refined;
  }
  for (size_t d = 0; d < values.size(); ++d) {
    scratch.codes[d] = static_cast<int>(position(values[d], lower, upper, most));
  }
  return {lower, (upper - lower) / most};
}

// Signs, standing for a vector of the same length.
Interval signs_of(Scratch& scratch) {
  for (size_t d = 0; d < scratch.values.size(); ++d) scratch.codes[d] = scratch.values[d] > 0;
  const double level = std::sqrt(sum_of_squares(scratch.values) / static_cast<double>(scratch.values.size()));
  return {-level, 2 * level};
}

void pack(const std::vector<int>& codes, int bits, uint8_t* planes) {
  const auto dim = static_cast<int64_t>(codes.size());
  const int64_t plane_bytes = (dim + 7) / 8;
  for (int plane = 0; plane < bits; ++plane, planes += plane_bytes) {
    const int shift = bits - 1 - plane;
    for (int64_t d = 0; d < dim; d += 8) {
      int byte = 0;
      for (int64_t j = 0; j < std::min<int64_t>(8, dim - d); ++j) byte |= (codes[d + j] >> shift & 1) << (7 - j);
      planes[d / 8] = static_cast<uint8_t>(byte);
    }
  }
}

// Returns false, having written nothing, when the vector in `scratch` holds a NaN or an infinity.
bool encode_row(const ScalarEncoder& encoder, Scratch& scratch, uint8_t* planes, float* factors) {
  std::vector<double>& values = scratch.values;
  const double squares = sum_of_squares(values);
  if (!std::isfinite(squares)) return false;
  if (encoder.metric == ScalarMetric::cosine && squares > 0) {
    const double scale = 1 / std::sqrt(squares);
    for (double& value : values) value *= scale;
  }
  // <x, y> = <x - m, y - m> + (<x, m> - <m, m> / 2) + (<y, m> - <m, m> / 2), and -|x - y|^2 / 2 is
  // <x - m, y - m> - |x - m|^2 / 2 - |y - m|^2 / 2: a summand of each of the two vectors makes either of their
  // centred inner product.
  double extra = 0;
  if (encoder.centroid != nullptr) {
    for (size_t d = 0; d < values.size(); ++d) {
      const double centre = encoder.centroid[d];
      extra += (values[d] - centre / 2) * centre;
      values[d] -= centre;
    }
  }
  if (encoder.metric == ScalarMetric::l2) extra = -sum_of_squares(values) / 2;
  if (encoder.signs != nullptr) rotate(values, encoder.signs);

  const Interval interval = encoder.method == ScalarMethod::rabitq ? rabitq(scratch, encoder.bits)
                            : encoder.method == ScalarMethod::osq  ? optimised(scratch, encoder.bits)
                                                                   : signs_of(scratch);
  pack(scratch.codes, encoder.bits, planes);
  int64_t sum = 0;
  for (const int code : scratch.codes) sum += code;
  factors[0] = static_cast<float>(interval.lower);
  factors[1] = static_cast<float>(interval.step);
  factors[2] = static_cast<float>(sum);
  factors[3] = static_cast<float>(extra);
  return true;
}

}  // namespace

int64_t scalar_encode(const ScalarEncoder& encoder, const void* x, DType dtype, int64_t rows, uint8_t* codes,
                      float* factors, int threads) {
  const int64_t bytes = encoder.bits * ((encoder.dim + 7) / 8);
  const int workers = team_size(rows, threads);
  std::vector<Scratch> scratch;
  for (int worker = 0; worker < workers; ++worker) scratch.emplace_back(encoder.dim);
  std::atomic<int64_t> next{0};
  First bad;
  parallel_for(workers, workers, [&](int64_t worker) {
    for (int64_t row; (row = next.fetch_add(1)) < rows;) {
      load(x, dtype, row * encoder.dim, scratch[worker].values);
      if (!encode_row(encoder, scratch[worker], codes + row * bytes, factors + row * scalar_factors)) bad.offer(row);
    }
  });
  return bad.index();
}

}  // namespace fastembed::search
