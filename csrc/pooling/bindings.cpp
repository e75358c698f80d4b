#include "pooling/arguments.hpp"
#include "pooling/pooling.hpp"

namespace py = pybind11;
namespace pooling = fastembed::pooling;

namespace {

// (address of pooled, address of winner or 0)
using StateTuple = std::tuple<pooling::Address, pooling::Address>;
// (address, size, state, gradients of the prefixes)
using ExitGradientTuple = std::tuple<pooling::Address, int64_t, StateTuple, pooling::PrefixTuples>;

pooling::State to_state(const StateTuple& tuple) {
  const auto& [pooled, winner] = tuple;
  return {reinterpret_cast<float*>(pooled), reinterpret_cast<int32_t*>(winner)};
}

void pool_exits(const std::vector<pooling::ExitTuple>& exits, int64_t sequences, int64_t tokens,
                const std::optional<pooling::MaskTuple>& mask, const std::optional<pooling::OffsetsTuple>& cu_seqlens,
                int mode, int dtype, int out_type, bool normalize, const std::vector<StateTuple>& states, int threads) {
  const pooling::OwnedBatch batch(sequences, tokens, mask, cu_seqlens);
  std::vector<pooling::State> to_fill;
  for (const StateTuple& state : states) to_fill.push_back(to_state(state));
  const py::gil_scoped_release release;
  pooling::pool_exits(pooling::to_exits(exits), to_fill, batch.get(), static_cast<pooling::Mode>(mode),
                      static_cast<fastembed::DType>(dtype), static_cast<pooling::OutputType>(out_type), normalize,
                      threads);
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

void pool_exits_backward(const std::vector<ExitGradientTuple>& tuples, int64_t sequences, int64_t tokens,
                         const std::optional<pooling::MaskTuple>& mask,
                         const std::optional<pooling::OffsetsTuple>& cu_seqlens, int mode, int dtype, int prefix_dtype,
                         bool normalize, int threads) {
  const pooling::OwnedBatch batch(sequences, tokens, mask, cu_seqlens);
  std::vector<pooling::ExitGradient> exits;
  for (const auto& [data, size, state, prefixes] : tuples) {
    exits.push_back({reinterpret_cast<void*>(data), size, to_state(state), pooling::to_prefixes(prefixes)});
  }
  const py::gil_scoped_release release;
  pooling::pool_exits_backward(std::move(exits), batch.get(), static_cast<pooling::Mode>(mode),
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
