#include <pybind11/pybind11.h>

#include "common/address.hpp"
#include "search/fde.hpp"
#include "search/relative.hpp"

namespace py = pybind11;
using namespace fastembed;

void bind_fde(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def(
      "fde",
      [](uintptr_t tokens, uintptr_t offsets, int64_t sequences, uintptr_t hyperplanes, uintptr_t projections,
         uintptr_t buckets, uintptr_t signs, int64_t dim, int64_t repetitions, int bits, int64_t projected,
         int64_t final_dim, bool documents, uintptr_t out, int threads) {
        const search::FDEMatrices matrices{pointer<const float>(hyperplanes),
                                           pointer<const float>(projections),
                                           dim,
                                           repetitions,
                                           bits,
                                           projected,
                                           pointer<const int64_t>(buckets),
                                           pointer<const float>(signs),
                                           final_dim};
        return search::fde(pointer<const float>(tokens), pointer<const int64_t>(offsets), sequences, matrices,
                           documents, pointer<float>(out), threads);
      },
      release);
  m.def(
      "relative_representations",
      [](uintptr_t x, int64_t rows, uintptr_t anchors, int64_t anchor_rows, int64_t dim, int dtype, uintptr_t out,
         int threads) {
        search::relative_representations(pointer<const void>(x), rows, pointer<const void>(anchors), anchor_rows, dim,
                                         static_cast<DType>(dtype), pointer<void>(out), threads);
      },
      release);
}
