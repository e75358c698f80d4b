// Stands for csrc/common/async_copy.cuh: the copies happen at once or when they are waited for (CUDA_ON_CPU_COPIES),
// the two ends of what the hardware may do. They are made here, in instrumented code, by the thread that started them.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "machine.hpp"

namespace fastembed::device {

inline void perform(const cuda_on_cpu::Copy& copy) {
  std::memcpy(copy.target, copy.source, copy.valid_bytes);
  std::memset(static_cast<char*>(copy.target) + copy.valid_bytes, 0, copy.bytes - copy.valid_bytes);
}

template <int bytes>
void copy_async(void* shared, const void* global, int valid_bytes = bytes,
                cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % bytes != 0) {
    cuda_on_cpu::fail("cp.async at " + cuda_on_cpu::describe(site) + ": an address is not aligned to " +
                      std::to_string(bytes) + " bytes");
  }
  if (valid_bytes < 0 || valid_bytes > bytes) {
    cuda_on_cpu::fail("cp.async at " + cuda_on_cpu::describe(site) + " copies " + std::to_string(valid_bytes) + " of " +
                      std::to_string(bytes) + " bytes");
  }
  const cuda_on_cpu::Copy copy = {shared, global, bytes, static_cast<size_t>(valid_bytes)};
  if (!cuda_on_cpu::put_off(copy)) perform(copy);
}

inline void commit_copies() { cuda_on_cpu::commit_copies(); }

template <int pending>
void wait_for_copies() {
  for (const cuda_on_cpu::Copy& copy : cuda_on_cpu::take_copies(pending)) perform(copy);
}

}  // namespace fastembed::device
