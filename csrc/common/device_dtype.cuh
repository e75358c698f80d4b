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

// Rounded to nearest even.
__device__ inline void store(void* data, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(data)[index] = value;
      return;
    case DType::bf16:
      static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16_rn(value);
      return;
    case DType::f16:
      static_cast<__half*>(data)[index] = __float2half_rn(value);
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

}  // namespace fastembed::device
