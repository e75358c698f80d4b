// Copies from global to shared memory that run beside the computation (cp.async, sm_80 and newer). PTX ISA, "Data
// Movement and Conversion Instructions: Non-bulk copy". tests/cuda_on_cpu/shim/common/async_copy.cuh simulates them.
#pragma once

#include <cstdint>

namespace fastembed::device {

// Starts a copy of `bytes` (4, 8 or 16, to which both addresses are aligned), of which only the first `valid_bytes` are
// read, zeros standing for the rest. 16 bytes at a time bypass the L1 cache.
template <int bytes>
__device__ inline void copy_async(void* shared, const void* global, int valid_bytes = bytes) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(valid_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(global), "n"(bytes),
                 "r"(valid_bytes)
                 : "memory");
  }
}

// Closes the group of copies that this thread has started since the last call; there may be none in it.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the `pending` newest groups of this thread are under way. What other threads copied is there only
// after a barrier that follows their wait.
template <int pending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace fastembed::device
