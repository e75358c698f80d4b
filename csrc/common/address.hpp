// Addresses as they cross the binding: integers on the Python side.
#pragma once

#include <cstdint>

namespace fastembed {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace fastembed
