#include <cuda_runtime.h>

#include "common/cuda_device.hpp"

namespace fastembed::cuda {

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace fastembed::cuda
