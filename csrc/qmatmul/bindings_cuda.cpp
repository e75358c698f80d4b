#include <pybind11/pybind11.h>

#include "common/address.hpp"
#include "qmatmul/qmatmul_cuda.hpp"

namespace py = pybind11;
using namespace fastembed;

namespace {

void qlinear(uintptr_t x, int dtype, int64_t rows, int64_t in_features, int64_t row_stride, uintptr_t codes,
             uintptr_t scales, int scale_dtype, uintptr_t zeros, int zero_kind, int bits, int64_t group_size,
             uintptr_t bias, int bias_dtype, int64_t out_features, int epilogue, uintptr_t residual, uintptr_t y,
             uintptr_t workspace, uintptr_t stream) {
  const qmatmul::Input input{pointer<const void>(x), static_cast<DType>(dtype), rows, row_stride};
  const qmatmul::Layer layer{pointer<const uint8_t>(codes),
                             {pointer<const void>(scales), static_cast<DType>(scale_dtype), pointer<const void>(zeros),
                              static_cast<qmatmul::Zeros>(zero_kind)},
                             bits,
                             group_size,
                             pointer<const void>(bias),
                             static_cast<DType>(bias_dtype),
                             in_features,
                             out_features,
                             static_cast<qmatmul::Epilogue>(epilogue),
                             qmatmul::Activations::int8};
  py::gil_scoped_release release;
  qmatmul::cuda::qlinear(input, layer, pointer<const void>(residual), pointer<void>(y), pointer<void>(workspace),
                         pointer<void>(stream));
}

}  // namespace

void bind_qmatmul_cuda(py::module_& m) {
  m.def("qlinear", &qlinear,
        "Linear layer on packed low-bit weights, on a stream; arguments checked by fastembed/ops/qmatmul.py, addresses "
        "on the device.");
  m.def("qlinear_workspace", &qmatmul::cuda::workspace_bytes, py::arg("rows"), py::arg("in_features"),
        py::arg("out_features"), "Bytes that qlinear needs as workspace.");
}
