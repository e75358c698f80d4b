#include <pybind11/pybind11.h>

#include "common/address.hpp"
#include "latent/latent.hpp"

namespace py = pybind11;
namespace latent = fastembed::latent;
using fastembed::DType;
using fastembed::pointer;

namespace {

latent::Weight weight(uintptr_t panels, int dtype, uintptr_t bias, int64_t in_features, int64_t out_features) {
  return {pointer<const void>(panels), static_cast<DType>(dtype), pointer<const float>(bias), in_features,
          out_features};
}

void attend(uintptr_t x, int dtype, int64_t stride, int64_t first, int64_t rows, int64_t features, uintptr_t offsets,
            uintptr_t score_panels, uintptr_t score_bias, uintptr_t value_panels, int weight_dtype, int64_t width,
            int64_t heads, float eps, uintptr_t normalized, uintptr_t y_sums, int threads) {
  const py::gil_scoped_release release;
  latent::attend({pointer<const void>(x), static_cast<DType>(dtype), stride, first, rows, pointer<int64_t>(offsets)},
                 weight(score_panels, weight_dtype, score_bias, features, width),
                 weight(value_panels, weight_dtype, 0, width, features), heads, eps, pointer<float>(normalized),
                 pointer<double>(y_sums), threads);
}

void feed_forward(uintptr_t normalized, int64_t first, int64_t rows, int64_t features, uintptr_t offsets,
                  uintptr_t panels, int weight_dtype, uintptr_t bias, int64_t hidden, uintptr_t gated_sums,
                  int threads) {
  const py::gil_scoped_release release;
  latent::feed_forward({pointer<const void>(normalized), DType::f32, features, first, rows, pointer<int64_t>(offsets)},
                       weight(panels, weight_dtype, bias, features, 2 * hidden), pointer<double>(gated_sums), threads);
}

void gate(uintptr_t values, uintptr_t gates, int64_t stride, int64_t first, int64_t rows, int64_t columns,
          uintptr_t offsets, uintptr_t gated_sums, int64_t sums_stride, int threads) {
  const py::gil_scoped_release release;
  latent::gate({pointer<const void>(values), DType::f32, stride, first, rows, pointer<int64_t>(offsets)},
               pointer<const void>(gates), columns, pointer<double>(gated_sums), sums_stride, threads);
}

void to_panels(uintptr_t from, int64_t out_features, int64_t in_features, bool gated, int dtype, uintptr_t panels,
               int threads) {
  const py::gil_scoped_release release;
  latent::to_panels(pointer<const float>(from), out_features, in_features, gated, static_cast<DType>(dtype),
                    pointer<void>(panels), threads);
}

}  // namespace

void bind_latent(py::module_& m) {
  m.def("latent_attend", &attend, py::arg("x"), py::arg("dtype"), py::arg("stride"), py::arg("first"), py::arg("rows"),
        py::arg("features"), py::arg("offsets"), py::arg("score_panels"), py::arg("score_bias"),
        py::arg("value_panels"), py::arg("weight_dtype"), py::arg("width"), py::arg("heads"), py::arg("eps"),
        py::arg("normalized"), py::arg("y_sums"), py::arg("threads"));
  m.def("latent_feed_forward", &feed_forward, py::arg("normalized"), py::arg("first"), py::arg("rows"),
        py::arg("features"), py::arg("offsets"), py::arg("panels"), py::arg("weight_dtype"), py::arg("bias"),
        py::arg("hidden"), py::arg("gated_sums"), py::arg("threads"));
  m.def("latent_gate", &gate, py::arg("values"), py::arg("gates"), py::arg("stride"), py::arg("first"), py::arg("rows"),
        py::arg("columns"), py::arg("offsets"), py::arg("gated_sums"), py::arg("sums_stride"), py::arg("threads"));
  m.def("latent_to_panels", &to_panels, py::arg("weight"), py::arg("out_features"), py::arg("in_features"),
        py::arg("gated"), py::arg("dtype"), py::arg("panels"), py::arg("threads"));
}
