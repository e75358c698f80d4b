#pragma once

#include <vector>

namespace fastembed::cuda {

// CUDA devices the driver offers; 0 where there is no driver.
int device_count();

// The architectures that the kernels were compiled for, times ten: 800, 900. Newer ones than the last run its PTX.
std::vector<int> architectures();

}  // namespace fastembed::cuda
