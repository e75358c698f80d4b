// Element types that cross the binding, numbered as the Python side numbers them, and their scalar
// conversions.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastembed {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace fastembed
