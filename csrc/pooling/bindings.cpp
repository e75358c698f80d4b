#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "pooling/pooling.hpp"

namespace py = pybind11;
namespace pooling = fastembed::pooling;

namespace {

using Address = uintptr_t;
using MaskTuple = std::tuple<Address, int64_t, int64_t, int64_t, uint64_t, uint64_t>;
using OffsetsTuple = std::tuple<Address, int64_t, bool>;
using PrefixTuples = std::vector<std::pair<int64_t, Address>>;
using ExitTuple = std::tuple<Address, int64_t, int64_t, PrefixTuples>;

void pool_exits(const std::vector<ExitTuple>& exit_tuples, int64_t sequences, int64_t tokens,
                const std::optional<MaskTuple>& mask_tuple, const std::optional<OffsetsTuple>& offsets_tuple, int mode,
                int dtype, int out_dtype, bool normalize, int threads) {
  std::vector<pooling::Exit> exits;
  exits.reserve(exit_tuples.size());
  for (const auto& [data, sequence_stride, token_stride, prefix_tuples] : exit_tuples) {
    std::vector<pooling::Prefix> prefixes;
    prefixes.reserve(prefix_tuples.size());
    for (const auto& [dim, out] : prefix_tuples) prefixes.push_back({dim, reinterpret_cast<void*>(out)});
    exits.push_back({reinterpret_cast<const void*>(data), sequence_stride, token_stride, std::move(prefixes)});
  }
  pooling::Batch batch = {sequences, tokens, nullptr, nullptr};
  pooling::Mask mask;
  if (mask_tuple) {
    const auto& [data, sequence_stride, token_stride, element_size, one, negative_zero] = *mask_tuple;
    mask = {reinterpret_cast<const void*>(data), sequence_stride, token_stride, element_size, one, negative_zero};
    batch.mask = &mask;
  }
  pooling::Offsets offsets;
  if (offsets_tuple) {
    const auto& [data, stride, is_int64] = *offsets_tuple;
    offsets = {reinterpret_cast<const void*>(data), stride, is_int64};
    batch.offsets = &offsets;
  }
  const py::gil_scoped_release release;
  pooling::pool_exits(std::move(exits), batch, static_cast<pooling::Mode>(mode), static_cast<fastembed::DType>(dtype),
                      static_cast<fastembed::DType>(out_dtype), normalize, threads);
}

}  // namespace

void bind_pooling(py::module_& m) {
  m.def("pool_exits", &pool_exits, py::arg("exits"), py::arg("sequences"), py::arg("tokens"), py::arg("mask"),
        py::arg("cu_seqlens"), py::arg("mode"), py::arg("dtype"), py::arg("out_dtype"), py::arg("normalize"),
        py::arg("threads"),
        "exits: (address, sequence stride, token stride, [(dim, address of its output)]); mask: (address, sequence "
        "stride, token stride, element size, bits of one, bits of negative zero) or None; cu_seqlens: (address, "
        "stride, is int64) or None. Strides in elements.");
}
