// What a .cu file finds under g++ in place of nvcc's language extensions; included ahead of every rewritten source.
// Types and their conversions are NVIDIA's own (the toolkit's headers compile with plain g++).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "atomics.hpp"
#include "collectives.hpp"
#include "intrinsics.hpp"
#include "launch.hpp"
#include "machine.hpp"

#define threadIdx (::cuda_on_cpu::current_thread->thread_index)
#define blockIdx (::cuda_on_cpu::current_launch.block_index)
#define blockDim (::cuda_on_cpu::current_launch.block_dim)
#define gridDim (::cuda_on_cpu::current_launch.grid_dim)
#define warpSize 32
#define __noinline__
#undef __launch_bounds__
#define __launch_bounds__(...)
