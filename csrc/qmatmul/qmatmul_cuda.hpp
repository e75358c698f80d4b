// Linear layers on packed low-bit weights, on a CUDA device. Pointers are device pointers; nothing here waits for the
// device or allocates.
#pragma once

#include <cstdint>

#include "qmatmul/qmatmul.hpp"

namespace fastembed::qmatmul::cuda {

// Bytes of device memory, aligned to 16, that qlinear needs to work in.
int64_t workspace_bytes(int64_t rows, int64_t in_features, int64_t out_features);

// The layer on x: y [rows, out_features], contiguous, in the dtype of x; so is the residual, which may be null. Runs on
// `stream` (a cudaStream_t). Codes, scales and zero points must be aligned to 16 bytes. Throws std::runtime_error when
// a launch fails.
void qlinear(const Input& x, const Layer& layer, const void* residual, void* y, void* workspace, void* stream);

}  // namespace fastembed::qmatmul::cuda
