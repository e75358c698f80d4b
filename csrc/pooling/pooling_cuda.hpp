// Multi-exit pooling on a CUDA device. Pointers are device pointers; nothing here waits for the device or allocates.
#pragma once

#include <cstdint>
#include <vector>

#include "pooling/pooling.hpp"

namespace fastembed::pooling::cuda {

// Floats of device memory that pool_exits needs to work in, `columns` being the largest dim of any exit.
int64_t workspace_floats(int64_t exits, int64_t columns, const Batch& batch);

// Fills every prefix, and the states unless there are none, on `stream` (a cudaStream_t). Values are not checked, for
// that would mean waiting: any mask value but zero is a valid token, and offsets are clamped to the tokens there are.
// Throws std::runtime_error when a launch fails.
void pool_exits(std::vector<Exit> exits, const std::vector<State>& states, const Batch& batch, Mode mode, DType dtype,
                OutputType out_type, bool normalize, float* workspace, void* stream);

// Floats of device memory that pool_exits_backward needs, the columns of an exit being its largest dim.
int64_t backward_workspace_floats(int64_t columns_of_all_exits, const Batch& batch);

// Fills every gradient, on `stream`; `dtype` is theirs, `prefix_dtype` that of the prefixes'. As above otherwise.
void pool_exits_backward(std::vector<ExitGradient> exits, const Batch& batch, Mode mode, DType dtype,
                         DType prefix_dtype, bool normalize, float* workspace, void* stream);

}  // namespace fastembed::pooling::cuda
