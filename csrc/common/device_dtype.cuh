// Element types on the device: conversions to and from float32, and 16-byte loads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "common/dtype.hpp"

namespace fastembed::device {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

// Rounded to nearest even.
template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float(float x) {
  return __float2half_rn(x);
}

// Element `index` of an array whose type is known at run time only.
__device__ inline float load(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(data)[index];
    case DType::bf16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
    case DType::f16:
      return to_float(static_cast<const __half*>(data)[index]);
  }
  return 0.0f;
}

// Its inverse, rounded.
__device__ inline void store(void* data, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(data)[index] = value;
      return;
    case DType::bf16:
      static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(value);
      return;
    case DType::f16:
      static_cast<__half*>(data)[index] = from_float<__half>(value);
      return;
  }
}

// The widest load there is: 16 bytes, which must be aligned to 16.
constexpr int vector_bytes = 16;
template <class T>
constexpr int vector_size = vector_bytes / static_cast<int>(sizeof(T));

template <class T>
__device__ inline void load_vector(const T* address, T (&values)[vector_size<T>]) {
  const uint4 bits = *reinterpret_cast<const uint4*>(address);
  memcpy(static_cast<void*>(values), &bits, vector_bytes);
}

template <class T>
__device__ inline void store_vector(T* address, const T (&values)[vector_size<T>]) {
  uint4 bits;
  memcpy(&bits, static_cast<const void*>(values), vector_bytes);
  *reinterpret_cast<uint4*>(address) = bits;
}

// Eight neighbours of an array whose type is known at run time only, from an address aligned to 16 bytes.
__device__ inline void load_eight(const void* data, DType dtype, int64_t index, float (&values)[8]) {
  if (dtype == DType::f32) {
    const auto* const source = static_cast<const float4*>(data) + index / 4;
    const float4 vectors[2] = {source[0], source[1]};
    memcpy(values, vectors, sizeof(values));
    return;
  }
  uint16_t bits[8];
  const uint4 vector = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + index);
  memcpy(bits, &vector, vector_bytes);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    values[i] = dtype == DType::bf16 ? to_float(__nv_bfloat16(__nv_bfloat16_raw{bits[i]}))
                                     : to_float(__half(__half_raw{bits[i]}));
  }
}

// Their inverse, each value rounded to nearest even.
__device__ inline void store_eight(void* data, DType dtype, int64_t index, const float (&values)[8]) {
  if (dtype == DType::f32) {
    float4 vectors[2];
    memcpy(vectors, values, sizeof(values));
    auto* const target = static_cast<float4*>(data) + index / 4;
    target[0] = vectors[0];
    target[1] = vectors[1];
    return;
  }
  uint16_t bits[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    bits[i] = dtype == DType::bf16 ? __nv_bfloat16_raw(__float2bfloat16_rn(values[i])).x
                                   : __half_raw(__float2half_rn(values[i])).x;
  }
  uint4 vector;
  memcpy(&vector, bits, vector_bytes);
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(data) + index) = vector;
}

}  // namespace fastembed::device
