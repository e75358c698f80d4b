#include <algorithm>
#include <cmath>

#include "common/divide_up.hpp"
#include "common/first.hpp"
#include "common/half.hpp"
#include "common/threading.hpp"
#include "search/search.hpp"
#include "search/sum_of_squares.hpp"

namespace fastembed::search {
namespace {

constexpr int64_t rows_per_task = 64;

// x > 0 without a conversion: the bits of a positive float are a positive integer, at most those of infinity (above
// stand the NaNs).
template <class Integer, Integer infinity>
void pack_row(const Integer* x, int64_t dim, uint8_t* code) {
  for (int64_t d = 0; d < dim; d += 8) {
    unsigned byte = 0;
    for (int64_t j = 0; j < std::min<int64_t>(8, dim - d); ++j) {
      byte |= static_cast<unsigned>(x[d + j] > 0 && x[d + j] <= infinity) << (7 - j);
    }
    code[d / 8] = static_cast<uint8_t>(byte);
  }
}

// The same with thresholds. A comparison with NaN is false.
template <class T, class ToFloat>
void pack_row_above(const T* x, const float* thresholds, int64_t dim, uint8_t* code, const ToFloat& to_float) {
  for (int64_t d = 0; d < dim; d += 8) {
    unsigned byte = 0;
    for (int64_t j = 0; j < std::min<int64_t>(8, dim - d); ++j) {
      byte |= static_cast<unsigned>(to_float(x[d + j]) > thresholds[d + j]) << (7 - j);
    }
    code[d / 8] = static_cast<uint8_t>(byte);
  }
}

// Steps of the uniform quantiser of least squared error for a unit normal source, by bits per dim (Max, "Quantizing for
// Minimum Distortion", 1960, table II; beyond 5 bits by his conditions). With 1 bit only the threshold at 0 is left and
// the step is of no account.
constexpr double optimal_step[] = {0.0, 0.0, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308};

// Returns false, having written nothing, when x holds a NaN or an infinity.
bool encode_row(const float* x, int64_t dim, int bits, uint8_t* code, float* inverse_norm) {
  const double total = sum_of_squares(x, dim);
  if (!std::isfinite(total)) return false;

  const double step = optimal_step[bits] * std::sqrt(total / static_cast<double>(dim));
  const int levels = 1 << bits;
  float thresholds[255];
  for (int t = 0; t < levels - 1; ++t) thresholds[t] = static_cast<float>((t + 1 - levels / 2) * step);

  const int64_t plane_bytes = divide_up(dim, 8);
  int64_t squares = 0;
  for (int64_t d = 0; d < dim; d += 8) {
    unsigned bytes[8] = {};
    for (int64_t j = 0; j < std::min<int64_t>(8, dim - d); ++j) {
      int c = 0;  // thresholds below x, by halving
      for (int half = levels / 2; half > 0; half /= 2) c += x[d + j] > thresholds[c + half - 1] ? half : 0;
      const int level = 2 * c - (levels - 1);
      squares += level * level;
      for (int plane = 0; plane < bits; ++plane)
        bytes[plane] |= static_cast<unsigned>(c >> (bits - 1 - plane) & 1) << (7 - j);
    }
    for (int plane = 0; plane < bits; ++plane) code[plane * plane_bytes + d / 8] = static_cast<uint8_t>(bytes[plane]);
  }
  *inverse_norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(squares)));
  return true;
}

template <class Row>
void for_rows(int64_t rows, int threads, const Row& body) {
  parallel_for(divide_up(rows, rows_per_task), threads, [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * rows_per_task);
    for (int64_t row = task * rows_per_task; row < end; ++row) body(row);
  });
}

}  // namespace

void pack_bits(const void* x, DType dtype, int64_t rows, int64_t dim, const float* thresholds, uint8_t* codes,
               int threads) {
  const int64_t bytes = divide_up(dim, 8);
  const auto row_of = [&](auto type, int64_t row) { return static_cast<const decltype(type)*>(x) + row * dim; };
  for_rows(rows, threads, [&](int64_t row) {
    uint8_t* const code = codes + row * bytes;
    if (thresholds == nullptr) {
      switch (dtype) {
        case DType::f32:
          return pack_row<int32_t, 0x7f800000>(row_of(int32_t{}, row), dim, code);
        case DType::bf16:
          return pack_row<int16_t, 0x7f80>(row_of(int16_t{}, row), dim, code);
        case DType::f16:
          return pack_row<int16_t, 0x7c00>(row_of(int16_t{}, row), dim, code);
      }
    }
    switch (dtype) {
      case DType::f32:
        return pack_row_above(row_of(float{}, row), thresholds, dim, code, [](float value) { return value; });
      case DType::bf16:
        return pack_row_above(row_of(uint16_t{}, row), thresholds, dim, code, bf16_to_float);
      case DType::f16:
        return pack_row_above(row_of(uint16_t{}, row), thresholds, dim, code, f16_to_float);
    }
  });
}

int64_t sdc_encode(const float* x, int64_t rows, int64_t dim, int bits, uint8_t* codes, float* inverse_norms,
                   int threads) {
  const int64_t bytes = bits * divide_up(dim, 8);
  First bad;
  for_rows(rows, threads, [&](int64_t row) {
    if (!encode_row(x + row * dim, dim, bits, codes + row * bytes, inverse_norms + row)) bad.offer(row);
  });
  return bad.index();
}

}  // namespace fastembed::search
