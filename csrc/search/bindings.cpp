#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <tuple>

#include "common/address.hpp"
#include "search/search.hpp"

namespace py = pybind11;
using namespace fastembed;

namespace {

search::Matrix matrix(uintptr_t address, int64_t rows, int64_t bytes, int64_t stride) {
  return {pointer<const uint8_t>(address), rows, bytes, stride};
}

using SelectionParts = std::tuple<uintptr_t, int64_t, uintptr_t, int64_t>;

// Addresses of arrays that are not there are 0, counts -1.
search::Selection selection(const SelectionParts& parts) {
  const auto [ids, id_count, ranges, range_count] = parts;
  return {pointer<const int64_t>(ids), id_count, pointer<const int64_t>(ranges), range_count};
}
}  // namespace

void bind_search(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("address", [](const py::array& array) { return reinterpret_cast<uintptr_t>(array.data()); });
  m.def(
      "pack_bits",
      [](uintptr_t x, int dtype, int64_t rows, int64_t dim, uintptr_t thresholds, uintptr_t codes, int threads) {
        search::pack_bits(pointer<const void>(x), static_cast<DType>(dtype), rows, dim,
                          pointer<const float>(thresholds), pointer<uint8_t>(codes), threads);
      },
      release);
  m.def(
      "hamming_topk",
      [](uintptr_t queries, int64_t query_rows, int64_t query_stride, uintptr_t codes, int64_t code_rows,
         int64_t code_stride, int64_t bytes, const SelectionParts& selected, int64_t k, uintptr_t distances,
         uintptr_t ids, int threads) {
        search::hamming_topk(matrix(queries, query_rows, bytes, query_stride),
                             matrix(codes, code_rows, bytes, code_stride), selection(selected), k,
                             pointer<int32_t>(distances), pointer<int64_t>(ids), threads);
      },
      release);
  py::class_<search::RangeResult>(m, "RangeResult")
      .def_property_readonly("total", [](const search::RangeResult& result) { return result.lims.back(); })
      .def(
          "write",
          [](const search::RangeResult& result, uintptr_t lims, uintptr_t distances, uintptr_t ids) {
            std::copy(result.lims.begin(), result.lims.end(), pointer<int64_t>(lims));
            result.write(pointer<int32_t>(distances), pointer<int64_t>(ids));
          },
          release);
  m.def(
      "hamming_range",
      [](uintptr_t queries, int64_t query_rows, int64_t query_stride, uintptr_t codes, int64_t code_rows,
         int64_t code_stride, int64_t bytes, const SelectionParts& selected, int64_t radius, int threads) {
        return search::hamming_range(matrix(queries, query_rows, bytes, query_stride),
                                     matrix(codes, code_rows, bytes, code_stride), selection(selected), radius,
                                     threads);
      },
      release);
  m.def(
      "sdc_encode",
      [](uintptr_t x, int64_t rows, int64_t dim, int bits, uintptr_t codes, uintptr_t inverse_norms, int threads) {
        return search::sdc_encode(pointer<const float>(x), rows, dim, bits, pointer<uint8_t>(codes),
                                  pointer<float>(inverse_norms), threads);
      },
      release);
  m.def(
      "sdc_topk",
      [](uintptr_t queries, uintptr_t query_inverse_norms, int64_t query_rows, int64_t query_stride, uintptr_t codes,
         uintptr_t inverse_norms, int64_t code_rows, int64_t code_stride, int64_t dim, int bits,
         const SelectionParts& selected, int64_t k, uintptr_t scores, uintptr_t ids, int threads) {
        const int64_t bytes = bits * ((dim + 7) / 8);
        search::sdc_topk({matrix(queries, query_rows, bytes, query_stride), pointer<const float>(query_inverse_norms)},
                         {matrix(codes, code_rows, bytes, code_stride), pointer<const float>(inverse_norms)},
                         selection(selected), dim, bits, k, pointer<float>(scores), pointer<int64_t>(ids), threads);
      },
      release);
  // `probed` are the lists to look into, or room for them where there are binary centroids; without inverse norms
  // values are Hamming distances.
  m.def(
      "lists_topk",
      [](uintptr_t queries, uintptr_t query_inverse_norms, int64_t query_rows, int64_t query_stride, uintptr_t codes,
         uintptr_t inverse_norms, int64_t code_rows, int64_t code_stride, int64_t dim, int bits, uintptr_t centroids,
         int64_t lists, uintptr_t starts, uintptr_t ids, uintptr_t probed, int64_t probes, int64_t k, uintptr_t values,
         uintptr_t rows, int threads) {
        const int64_t plane_bytes = (dim + 7) / 8;
        const search::Matrix q = matrix(queries, query_rows, bits * plane_bytes, query_stride);
        const search::Matrix c = matrix(codes, code_rows, bits * plane_bytes, code_stride);
        if (centroids != 0) {
          search::nearest_lists(q, matrix(centroids, lists, plane_bytes, plane_bytes), probes, pointer<int64_t>(probed),
                                threads);
        }
        const search::InvertedLists inverted = {pointer<const int64_t>(starts), pointer<const int64_t>(ids), probes};
        if (inverse_norms == 0) {
          return search::hamming_lists_topk(q, c, inverted, pointer<const int64_t>(probed), k, pointer<int32_t>(values),
                                            pointer<int64_t>(rows), threads);
        }
        search::sdc_lists_topk({q, pointer<const float>(query_inverse_norms)}, {c, pointer<const float>(inverse_norms)},
                               inverted, pointer<const int64_t>(probed), dim, bits, k, pointer<float>(values),
                               pointer<int64_t>(rows), threads);
      },
      release);
  m.def(
      "rescore",
      [](uintptr_t queries, int64_t rows, uintptr_t documents, int64_t dim, uintptr_t candidates, int64_t count,
         int64_t k, uintptr_t scores, uintptr_t ids, int threads) {
        search::rescore(pointer<const float>(queries), rows, pointer<const float>(documents), dim,
                        pointer<const int64_t>(candidates), count, k, pointer<float>(scores), pointer<int64_t>(ids),
                        threads);
      },
      release);
}
