// Stand-ins for the parts of the CUDA runtime that the launchers call.
#include <cuda_runtime.h>

#include <cstdlib>
#include <string>

#include "machine.hpp"

namespace {

// The message of the error that cudaGetLastError returned last.
std::string& reported() {
  static std::string message;
  return message;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// All that is asked for: the shared memory that a block may have.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = static_cast<int>(cuda_on_cpu::most_shared_bytes());
  return cudaSuccess;
}

// Shared memory beyond 48 KiB, which the launch itself checks.
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaPeekAtLastError() {
  reported() = cuda_on_cpu::last_error();
  return reported().empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = cudaPeekAtLastError();
  cuda_on_cpu::last_error().clear();
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? reported().c_str() : "no error";
}
}
