// Atomics: real ones, each also a point where other threads may run. Relaxed as on a GPU, except under
// ThreadSanitizer: it cannot see __threadfence, so there every atomic orders what stands around it.
#pragma once

#include <type_traits>

#include "machine.hpp"

#if defined(__SANITIZE_THREAD__)
#define CUDA_ON_CPU_MEMORY_ORDER __ATOMIC_ACQ_REL
#else
#define CUDA_ON_CPU_MEMORY_ORDER __ATOMIC_RELAXED
#endif

namespace cuda_on_cpu {

template <class T, class Update>
T read_modify_write(T* address, Update update) {
  yield();
  T old;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  for (;;) {
    T updated = update(old);
    if (__atomic_compare_exchange(address, &old, &updated, false, CUDA_ON_CPU_MEMORY_ORDER, __ATOMIC_RELAXED)) {
      return old;
    }
  }
}

}  // namespace cuda_on_cpu

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return cuda_on_cpu::read_modify_write(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return cuda_on_cpu::read_modify_write(address, [=](T old) { return static_cast<T>(old - value); });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return cuda_on_cpu::read_modify_write(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return cuda_on_cpu::read_modify_write(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return cuda_on_cpu::read_modify_write(address, [=](T old) { return static_cast<T>(old | value); });
}
template <class T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return cuda_on_cpu::read_modify_write(address, [=](T old) { return static_cast<T>(old & value); });
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return cuda_on_cpu::read_modify_write(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return cuda_on_cpu::read_modify_write(address, [=](T old) { return old == expected ? value : old; });
}

inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __threadfence_system() {}
