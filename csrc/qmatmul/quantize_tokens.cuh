// Activations as the multiplying kernels take them: int8 codes with one scale per token, in the order in which a lane
// of mma reads them.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/device_dtype.cuh"
#include "common/device_reduce.cuh"
#include "qmatmul/kernels.hpp"
#include "qmatmul/warp_tile.cuh"

namespace fastembed::qmatmul::cuda {

constexpr int quantize_threads = 128;

// int8 activations of 8 tokens for 32 input features, as the lanes of a warp hold them.
using TokenFragment = uint2;
constexpr int fragment_features = 32;
constexpr int stage_fragments = stage_features / fragment_features;
constexpr int fragment_bytes = warp_threads * static_cast<int>(sizeof(TokenFragment));

struct QuantizedTokens {
  TokenFragment* fragments;  // [stages * 2, tiles, 32]
  float* scales;             // [tiles * 8]
  int64_t tiles;             // of 8 tokens
};

// Input features 4 quad .. of a token, zeros past its end.
template <class T>
__device__ void load_quad(const T* token, int64_t quad, int64_t in_features, bool vectorised, float (&x)[4]) {
  struct alignas(4 * sizeof(T)) Vector {
    T elements[4];
  };
  const int64_t first = 4 * quad;
  if (vectorised && first + 4 <= in_features) {
    const Vector vector = *reinterpret_cast<const Vector*>(token + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = device::to_float(vector.elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = first + i < in_features ? device::to_float(token[first + i]) : 0.0f;
  }
}

// Grid: tokens, rounded up to 8. Those past the end become zeros.
template <class T>
__global__ void __launch_bounds__(quantize_threads)
    quantize_tokens(const T* x, int64_t rows, int64_t stride, int64_t in_features, int64_t quads, bool vectorised,
                    QuantizedTokens to) {
  const int64_t token = blockIdx.x;
  const T* const row = x + token * stride;
  const int64_t read_quads = token < rows ? (in_features + 3) / 4 : 0;

  // The bits of magnitudes are ordered as the magnitudes are, infinity and NaN last.
  unsigned largest = __float_as_uint(smallest_amax);
  for (int64_t quad = threadIdx.x; quad < read_quads; quad += quantize_threads) {
    float values[4];
    load_quad(row, quad, in_features, vectorised, values);
#pragma unroll
    for (const float value : values) largest = max(largest, __float_as_uint(fabsf(value)));
  }
  largest = device::block_reduce<quantize_threads>(largest, 0u, [](unsigned a, unsigned b) { return max(a, b); });
  const bool finite = largest < __float_as_uint(INFINITY);
  const float amax = __uint_as_float(largest);
  const float inverse = 127.0f / amax;
  if (threadIdx.x == 0) to.scales[token] = finite ? amax * (1.0f / 127.0f) : __uint_as_float(0x7fc00000u);

  auto* const words = reinterpret_cast<uint32_t*>(to.fragments);
  for (int64_t quad = threadIdx.x; quad < quads; quad += quantize_threads) {
    uint32_t word = 0;
    if (finite && quad < read_quads) {
      float values[4];
      load_quad(row, quad, in_features, vectorised, values);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        word |= static_cast<uint32_t>(static_cast<int>(rintf(values[i] * inverse)) & 0xff) << 8 * i;
      }
    }
    const int64_t fragment = quad / 8 * to.tiles + token / operand_tokens;
    const int64_t lane = token % operand_tokens * 4 + quad % 4;
    words[(fragment * warp_threads + lane) * 2 + quad / 4 % 2] = word;
  }
}

}  // namespace fastembed::qmatmul::cuda
