#include <pybind11/pybind11.h>

#include "common/address.hpp"
#include "search/search_cuda.hpp"

namespace py = pybind11;
namespace cuda = fastembed::search::cuda;
using fastembed::pointer;

namespace {

// (address, rows, bytes from row to row, address of the inverse norms or 0)
using CodesTuple = std::tuple<uintptr_t, int64_t, int64_t, uintptr_t>;

cuda::Codes to_codes(const CodesTuple& tuple) {
  const auto& [data, rows, stride, inverse_norms] = tuple;
  return {pointer<const uint8_t>(data), rows, stride, pointer<const float>(inverse_norms)};
}

void find_candidates(const CodesTuple& queries, const CodesTuple& codes, int bits, int64_t plane_bytes, int64_t dim,
                     bool on_bit_products, uintptr_t mask, uintptr_t ranges, int64_t ranges_per_query, int64_t k,
                     uintptr_t keys, uintptr_t ids, uintptr_t workspace, uintptr_t stream) {
  const cuda::Filter filter = {pointer<const uint8_t>(mask), pointer<const int64_t>(ranges), ranges_per_query};
  const py::gil_scoped_release release;
  cuda::find_candidates(to_codes(queries), to_codes(codes), {bits, plane_bytes, dim, on_bit_products}, filter, k,
                        pointer<int32_t>(keys), pointer<int32_t>(ids), pointer<void>(workspace), pointer<void>(stream));
}

}  // namespace

void bind_search_cuda(py::module_& m) {
  m.def("find_candidates", &find_candidates,
        "The k best codes of every slice, on a stream; see csrc/search/search_cuda.hpp. Addresses are on the device.");
  m.def("search_slices", &cuda::slices, py::arg("queries"), py::arg("codes"), py::arg("k"));
  m.def("search_workspace", &cuda::workspace_bytes, py::arg("queries"), py::arg("codes"), py::arg("k"),
        "Bytes that find_candidates needs as workspace.");
}
