#include <pybind11/pybind11.h>

#include <tuple>

#include "common/address.hpp"
#include "search/scalar_codes.hpp"

namespace py = pybind11;
using namespace fastembed;

void bind_scalar_codes(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def(
      "scalar_encode",
      [](uintptr_t x, int dtype, int64_t rows, int64_t dim, uintptr_t centroid, uintptr_t signs, int bits, int method,
         int metric, uintptr_t codes, uintptr_t factors, int threads) {
        const search::ScalarEncoder encoder = {static_cast<search::ScalarMethod>(method),
                                               static_cast<search::ScalarMetric>(metric),
                                               bits,
                                               dim,
                                               pointer<const float>(centroid),
                                               pointer<const uint8_t>(signs)};
        return search::scalar_encode(encoder, pointer<const void>(x), static_cast<DType>(dtype), rows,
                                     pointer<uint8_t>(codes), pointer<float>(factors), threads);
      },
      release);
  m.def(
      "scalar_topk",
      [](uintptr_t queries, uintptr_t query_factors, int64_t query_rows, int64_t query_stride, int query_bits,
         uintptr_t codes, uintptr_t factors, int64_t code_rows, int64_t code_stride, int bits, int64_t dim,
         const std::tuple<uintptr_t, int64_t, uintptr_t, int64_t>& selected, int64_t k, uintptr_t scores, uintptr_t ids,
         int threads) {
        const auto [listed, id_count, ranges, range_count] = selected;
        const int64_t plane_bytes = (dim + 7) / 8;
        const auto matrix = [&](uintptr_t address, int64_t rows, int64_t stride, uintptr_t beside, int planes) {
          return search::ScalarMatrix{{pointer<const uint8_t>(address), rows, planes * plane_bytes, stride},
                                      pointer<const float>(beside),
                                      planes};
        };
        search::scalar_topk(matrix(queries, query_rows, query_stride, query_factors, query_bits),
                            matrix(codes, code_rows, code_stride, factors, bits),
                            {pointer<const int64_t>(listed), id_count, pointer<const int64_t>(ranges), range_count},
                            dim, k, pointer<float>(scores), pointer<int64_t>(ids), threads);
      },
      release);
}
