#pragma once

#include <cstdint>

namespace fastembed {

// How many pieces of size b make up a.
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastembed
