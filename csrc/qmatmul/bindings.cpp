#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "common/address.hpp"
#include "qmatmul/qmatmul.hpp"

namespace py = pybind11;
using namespace fastembed;
using qmatmul::Layer;

namespace {

Layer make_layer(int64_t in_features, int64_t out_features, uintptr_t codes, uintptr_t scales, int scale_dtype,
                 uintptr_t zeros, int zero_kind, int bits, int64_t group_size, uintptr_t bias, int bias_dtype,
                 int epilogue, int activations) {
  return {pointer<const uint8_t>(codes),
          {pointer<const void>(scales), static_cast<DType>(scale_dtype), pointer<const void>(zeros),
           static_cast<qmatmul::Zeros>(zero_kind)},
          bits,
          group_size,
          pointer<const void>(bias),
          static_cast<DType>(bias_dtype),
          in_features,
          out_features,
          static_cast<qmatmul::Epilogue>(epilogue),
          static_cast<qmatmul::Activations>(activations)};
}

void run_layer(const Layer& layer, uintptr_t x, int dtype, int64_t rows, int64_t row_stride, uintptr_t residual,
               uintptr_t y, int threads) {
  const qmatmul::Projection projection{&layer, pointer<const void>(residual), pointer<void>(y)};
  py::gil_scoped_release release;
  qmatmul::qlinear({pointer<const void>(x), static_cast<DType>(dtype), rows, row_stride}, &projection, 1, threads);
}

void run_layers(const std::vector<std::pair<const Layer*, uintptr_t>>& layers, uintptr_t x, int dtype, int64_t rows,
                int64_t row_stride, int threads) {
  std::vector<qmatmul::Projection> projections;
  for (const auto& [layer, y] : layers) projections.push_back({layer, nullptr, pointer<void>(y)});
  py::gil_scoped_release release;
  qmatmul::qlinear({pointer<const void>(x), static_cast<DType>(dtype), rows, row_stride}, projections.data(),
                   static_cast<int64_t>(projections.size()), threads);
}

}  // namespace

void bind_qmatmul(py::module_& m) {
  py::class_<Layer>(m, "QLinear",
                    "A linear layer on packed low-bit weights, by the addresses of its tensors, which the caller keeps "
                    "alive; checked by fastembed/ops/qmatmul.py.")
      .def(py::init(&make_layer))
      .def("__call__", &run_layer);
  m.def("qlinears", &run_layers, "Pairs (QLinear, y) on one input, which is quantised once.");
}
