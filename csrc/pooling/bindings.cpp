#include "pooling/arguments.hpp"
#include "pooling/pooling.hpp"

namespace py = pybind11;
namespace pooling = fastembed::pooling;

namespace {

void pool_exits(const std::vector<pooling::ExitTuple>& exits, int64_t sequences, int64_t tokens,
                const std::optional<pooling::MaskTuple>& mask, const std::optional<pooling::OffsetsTuple>& cu_seqlens,
                int mode, int dtype, int out_dtype, bool normalize, int threads) {
  const pooling::OwnedBatch batch(sequences, tokens, mask, cu_seqlens);
  const py::gil_scoped_release release;
  pooling::pool_exits(pooling::to_exits(exits), batch.get(), static_cast<pooling::Mode>(mode),
                      static_cast<fastembed::DType>(dtype), static_cast<fastembed::DType>(out_dtype), normalize,
                      threads);
}

}  // namespace

void bind_pooling(py::module_& m) {
  m.def("pool_exits", &pool_exits, py::arg("exits"), py::arg("sequences"), py::arg("tokens"), py::arg("mask"),
        py::arg("cu_seqlens"), py::arg("mode"), py::arg("dtype"), py::arg("out_dtype"), py::arg("normalize"),
        py::arg("threads"), "The tuples are described in csrc/pooling/arguments.hpp.");
}
