// Stands for csrc/common/tensor_core.cuh, which describes the fragments: each function is one operation of a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "collectives.hpp"

namespace fastembed::device {

template <class Sum>
struct MmaOperands {
  uint32_t a[4];
  uint32_t b[2];
  Sum d[4];
};
template <class Sum>
struct MmaResult {
  Sum d[4];
};

// multiply(x, y) is the sum of the products of two registers' elements. Float sums are made in double and rounded once.
template <class Sum, class Multiply>
void simulate_mma(const char* name, Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], cuda_on_cpu::Site site,
                  Multiply multiply) {
  MmaOperands<Sum> operands;
  std::copy_n(a, 4, operands.a);
  std::copy_n(b, 2, operands.b);
  std::copy_n(d, 4, operands.d);
  const auto result = cuda_on_cpu::collective<MmaOperands<Sum>, MmaResult<Sum>>(
      name, ~0u, operands, site, [=](auto* in, auto* out, unsigned lanes) {
        if (lanes != ~0u)
          cuda_on_cpu::fail(std::string(name) + " at " + cuda_on_cpu::describe(site) + " needs 32 lanes");
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2);
            const int column = 2 * (lane % 4) + i % 2;
            std::conditional_t<std::is_integral_v<Sum>, int64_t, double> sum = in[lane]->d[i];
            for (int word = 0; word < 8; ++word) {  // of the row of A and the column of B
              const uint32_t x = in[row % 8 * 4 + word % 4]->a[row / 8 + 2 * (word / 4)];
              const uint32_t y = in[column * 4 + word % 4]->b[word / 4];
              sum += multiply(x, y);
            }
            out[lane]->d[i] = static_cast<Sum>(sum);
          }
        }
      });
  std::copy_n(result.d, 4, d);
}

template <class X, class Y>
int dot_bytes(uint32_t x, uint32_t y) {
  int sum = 0;
  for (int i = 0; i < 4; ++i) sum += static_cast<X>(x >> (8 * i)) * static_cast<Y>(y >> (8 * i));
  return sum;
}

// to_float takes the bits of one element.
template <class ToFloat>
double dot_pairs(uint32_t x, uint32_t y, ToFloat to_float) {
  const auto product = [&](int shift) {
    return static_cast<double>(to_float(static_cast<uint16_t>(x >> shift))) *
           to_float(static_cast<uint16_t>(y >> shift));
  };
  return product(0) + product(16);
}
inline double dot_bf16(uint32_t x, uint32_t y) {
  return dot_pairs(x, y, [](uint16_t bits) { return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits})); });
}
inline double dot_f16(uint32_t x, uint32_t y) {
  return dot_pairs(x, y, [](uint16_t bits) { return __half2float(__half(__half_raw{bits})); });
}

#define CUDA_ON_CPU_MMA(name, Sum, ...)                                                            \
  inline void name(Sum(&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDA_ON_CPU_SITE) { \
    simulate_mma(#name, d, a, b, site, __VA_ARGS__);                                               \
  }

CUDA_ON_CPU_MMA(mma_s8_s8, int, dot_bytes<int8_t, int8_t>)
CUDA_ON_CPU_MMA(mma_u8_s8, int, dot_bytes<uint8_t, int8_t>)
CUDA_ON_CPU_MMA(mma_s8_u8, int, dot_bytes<int8_t, uint8_t>)
CUDA_ON_CPU_MMA(mma_bf16, float, dot_bf16)
CUDA_ON_CPU_MMA(mma_f16, float, dot_f16)
CUDA_ON_CPU_MMA(mma_b1_xor, int, [](uint32_t x, uint32_t y) { return std::popcount(x ^ y); })
CUDA_ON_CPU_MMA(mma_b1_and, int, [](uint32_t x, uint32_t y) { return std::popcount(x & y); })

#undef CUDA_ON_CPU_MMA

// The lanes exchange the rows' addresses; each then reads for itself, so that the sanitizers see whose access it is.
template <bool transposed, int matrices>
void simulate_ldmatrix(uint32_t (&registers)[matrices], const void* row, cuda_on_cpu::Site site) {
  static_assert(matrices == 1 || matrices == 2 || matrices == 4);
  struct Rows {
    const void* of_lane[32];
  };
  const bool used = cuda_on_cpu::lane() < 8 * matrices;
  if (used && reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    cuda_on_cpu::fail("ldmatrix at " + cuda_on_cpu::describe(site) + ": a row is not aligned to 16 bytes");
  }
  const auto rows =
      cuda_on_cpu::collective<const void*, Rows>("ldmatrix", ~0u, row, site, [=](auto* in, auto* out, unsigned lanes) {
        if (lanes != ~0u) cuda_on_cpu::fail("ldmatrix at " + cuda_on_cpu::describe(site) + " needs 32 lanes");
        for (int lane = 0; lane < 32; ++lane) {
          for (int other = 0; other < 32; ++other) out[lane]->of_lane[other] = *in[other];
        }
      });
  const int lane = static_cast<int>(cuda_on_cpu::lane());
  for (int matrix = 0; matrix < matrices; ++matrix) {
    if constexpr (transposed) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const void* const source = rows.of_lane[8 * matrix + 2 * (lane % 4) + i];
        std::memcpy(&pair[i], static_cast<const char*>(source) + 2 * (lane / 4), 2);
      }
      std::memcpy(&registers[matrix], pair, 4);
    } else {
      const auto* address = static_cast<const char*>(rows.of_lane[8 * matrix + lane / 4]) + 4 * (lane % 4);
      std::memcpy(&registers[matrix], address, 4);
    }
  }
}

template <int matrices>
void load_matrices(uint32_t (&registers)[matrices], const void* row, CUDA_ON_CPU_SITE) {
  simulate_ldmatrix<false>(registers, row, site);
}
template <int matrices>
void load_matrices_transposed(uint32_t (&registers)[matrices], const void* row, CUDA_ON_CPU_SITE) {
  simulate_ldmatrix<true>(registers, row, site);
}

}  // namespace fastembed::device
