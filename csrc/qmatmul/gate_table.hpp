#pragma once

#include "qmatmul/kernels.hpp"

namespace fastembed::qmatmul {

// Coefficients [gate_coefficients][gate_segments] of x -> max(x, 0) - epilogue(x), in powers of the distance from the
// segment's start, measured in segments. Null for an epilogue that needs none.
const float* gate_table(Epilogue epilogue);

}  // namespace fastembed::qmatmul
