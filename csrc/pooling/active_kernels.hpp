#pragma once

#include "pooling/kernels.hpp"

namespace fastembed::pooling {

// The kernels of the instruction set in use.
const Kernels& active_kernels();

}  // namespace fastembed::pooling
