// Errors of a kernel launch as C++ exceptions, which the bindings turn into Python's RuntimeError.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastembed::cuda {

// Call right after a launch. Sees a launch that could not start; what fails while it runs shows at the next
// synchronisation, as usual with CUDA.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA kernel ") + kernel + ": " + cudaGetErrorString(error));
  }
}

}  // namespace fastembed::cuda
