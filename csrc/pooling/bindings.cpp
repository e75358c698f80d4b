#include "pooling/arguments.hpp"
#include "pooling/pooling.hpp"

namespace py = pybind11;
namespace pooling = fastembed::pooling;

namespace {

void pool_exits(const std::vector<pooling::ExitTuple>& exits, int64_t sequences, int64_t tokens,
                const std::optional<pooling::MaskTuple>& mask, const std::optional<pooling::OffsetsTuple>& cu_seqlens,
                int mode, int dtype, int out_type, bool normalize, const std::vector<pooling::StateTuple>& states,
                int threads) {
  const pooling::OwnedBatch batch(sequences, tokens, mask, cu_seqlens);
  const py::gil_scoped_release release;
  pooling::pool_exits(pooling::to_exits(exits), pooling::to_states(states), batch.get(),
                      static_cast<pooling::Mode>(mode), static_cast<fastembed::DType>(dtype),
                      static_cast<pooling::OutputType>(out_type), normalize, threads);
}

void pool_modes(const std::vector<pooling::ExitTuple>& exits, int64_t sequences, int64_t tokens,
                const std::optional<pooling::MaskTuple>& mask, const std::optional<pooling::OffsetsTuple>& cu_seqlens,
                const std::vector<int>& modes, int dtype, int out_type, bool normalize,
                const std::vector<int64_t>& sizes, int threads) {
  const pooling::OwnedBatch batch(sequences, tokens, mask, cu_seqlens);
  pooling::SeveralModes several = {{}, sizes};
  for (const int mode : modes) several.modes.push_back(static_cast<pooling::Mode>(mode));
  const py::gil_scoped_release release;
  pooling::pool_modes(pooling::to_exits(exits), several, batch.get(), static_cast<fastembed::DType>(dtype),
                      static_cast<pooling::OutputType>(out_type), normalize, threads);
}

void pool_exits_backward(const std::vector<pooling::ExitGradientTuple>& exits, int64_t sequences, int64_t tokens,
                         const std::optional<pooling::MaskTuple>& mask,
                         const std::optional<pooling::OffsetsTuple>& cu_seqlens, int mode, int dtype, int prefix_dtype,
                         bool normalize, int threads) {
  const pooling::OwnedBatch batch(sequences, tokens, mask, cu_seqlens);
  const py::gil_scoped_release release;
  pooling::pool_exits_backward(pooling::to_exit_gradients(exits), batch.get(), static_cast<pooling::Mode>(mode),
                               static_cast<fastembed::DType>(dtype), static_cast<fastembed::DType>(prefix_dtype),
                               normalize, threads);
}

}  // namespace

void bind_pooling(py::module_& m) {
  m.def("pool_exits", &pool_exits, py::arg("exits"), py::arg("sequences"), py::arg("tokens"), py::arg("mask"),
        py::arg("cu_seqlens"), py::arg("mode"), py::arg("dtype"), py::arg("out_type"), py::arg("normalize"),
        py::arg("states"), py::arg("threads"),
        "The tuples are described in csrc/pooling/arguments.hpp; states, one per exit or none, hold the addresses of "
        "the float32 pooled vectors and, for max, of the int32 winners (else 0).");
  m.def("pool_modes", &pool_modes, py::arg("exits"), py::arg("sequences"), py::arg("tokens"), py::arg("mask"),
        py::arg("cu_seqlens"), py::arg("modes"), py::arg("dtype"), py::arg("out_type"), py::arg("normalize"),
        py::arg("sizes"), py::arg("threads"),
        "As pool_exits for several modes side by side, of exits of so many columns.");
  m.def("pool_exits_backward", &pool_exits_backward, py::arg("exits"), py::arg("sequences"), py::arg("tokens"),
        py::arg("mask"), py::arg("cu_seqlens"), py::arg("mode"), py::arg("dtype"), py::arg("prefix_dtype"),
        py::arg("normalize"), py::arg("threads"),
        "An exit is (address of its gradient, size, state, [(dim, address of the prefix's gradient)]).");
}
