// kernel<<<grid, block, shared, stream>>>(arguments) and __shared__, as the rewriter spells them.
#pragma once

#include "machine.hpp"

namespace cuda_on_cpu {

struct Configuration {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

// Arguments are copied once per CUDA thread, as each has its own parameters.
template <class Kernel, class... Arguments>
void launch(const char* name, const Configuration& at, Kernel kernel, Arguments... arguments) {
  auto body = [&] { kernel(arguments...); };
  run_grid(name, at.grid, at.block, at.shared_bytes, [](void* run) { (*static_cast<decltype(body)*>(run))(); }, &body);
}

// A __shared__ variable of type T; Tag tells variables of one type apart.
template <class T, class Tag>
T& shared() {
  static char key;
  return *static_cast<T*>(shared_variable(&key, sizeof(T)));
}

}  // namespace cuda_on_cpu
