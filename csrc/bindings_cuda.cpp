// The Python module fastembed._cuda: launchers of the CUDA kernels. Device pointers and the stream come in as integers.
// No CUDA header here, so that the same file binds the kernels compiled for the CPU by tests/cuda_on_cpu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cuda_device.hpp"

namespace py = pybind11;

// One per family, in csrc/<family>/bindings_cuda.cpp.
void bind_latent_cuda(py::module_& m);
void bind_pooling_cuda(py::module_& m);
void bind_qmatmul_cuda(py::module_& m);
void bind_search_cuda(py::module_& m);

PYBIND11_MODULE(_cuda, m) {
  m.def("device_count", &fastembed::cuda::device_count, "CUDA devices the driver offers; 0 without a driver.");
  m.attr("architectures") = fastembed::cuda::architectures();
  bind_latent_cuda(m);
  bind_pooling_cuda(m);
  bind_qmatmul_cuda(m);
  bind_search_cuda(m);
}
