#pragma once

namespace fastembed::cuda {

// CUDA devices the driver offers; 0 where there is no driver.
int device_count();

}  // namespace fastembed::cuda
