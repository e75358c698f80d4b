#include "pooling/arguments.hpp"
#include "pooling/pooling_cuda.hpp"

namespace py = pybind11;
namespace pooling = fastembed::pooling;

namespace {

void pool_exits(const std::vector<pooling::ExitTuple>& exits, int64_t sequences, int64_t tokens,
                const std::optional<pooling::MaskTuple>& mask, const std::optional<pooling::OffsetsTuple>& cu_seqlens,
                int mode, int dtype, int out_type, bool normalize, const std::vector<pooling::StateTuple>& states,
                pooling::Address workspace, pooling::Address stream) {
  const pooling::OwnedBatch batch(sequences, tokens, mask, cu_seqlens);
  const py::gil_scoped_release release;
  pooling::cuda::pool_exits(pooling::to_exits(exits), pooling::to_states(states), batch.get(),
                            static_cast<pooling::Mode>(mode), static_cast<fastembed::DType>(dtype),
                            static_cast<pooling::OutputType>(out_type), normalize, reinterpret_cast<float*>(workspace),
                            reinterpret_cast<void*>(stream));
}

void pool_exits_backward(const std::vector<pooling::ExitGradientTuple>& exits, int64_t sequences, int64_t tokens,
                         const std::optional<pooling::MaskTuple>& mask,
                         const std::optional<pooling::OffsetsTuple>& cu_seqlens, int mode, int dtype, int prefix_dtype,
                         bool normalize, pooling::Address workspace, pooling::Address stream) {
  const pooling::OwnedBatch batch(sequences, tokens, mask, cu_seqlens);
  const py::gil_scoped_release release;
  pooling::cuda::pool_exits_backward(pooling::to_exit_gradients(exits), batch.get(), static_cast<pooling::Mode>(mode),
                                     static_cast<fastembed::DType>(dtype), static_cast<fastembed::DType>(prefix_dtype),
                                     normalize, reinterpret_cast<float*>(workspace), reinterpret_cast<void*>(stream));
}

int64_t pool_exits_backward_workspace(int64_t columns_of_all_exits, int64_t sequences) {
  return pooling::cuda::backward_workspace_floats(columns_of_all_exits, {sequences, 0, nullptr, nullptr});
}

int64_t pool_exits_workspace(int64_t exits, int64_t columns, int64_t sequences, int64_t tokens, bool packed) {
  const pooling::Offsets offsets = {};
  return pooling::cuda::workspace_floats(exits, columns, {sequences, tokens, nullptr, packed ? &offsets : nullptr});
}

}  // namespace

void bind_pooling_cuda(py::module_& m) {
  m.def(
      "pool_exits", &pool_exits, py::arg("exits"), py::arg("sequences"), py::arg("tokens"), py::arg("mask"),
      py::arg("cu_seqlens"), py::arg("mode"), py::arg("dtype"), py::arg("out_type"), py::arg("normalize"),
      py::arg("states"), py::arg("workspace"), py::arg("stream"),
      "Launches the kernels on a stream. The tuples are described in csrc/pooling/arguments.hpp; addresses are on the "
      "device.");
  m.def("pool_exits_workspace", &pool_exits_workspace, py::arg("exits"), py::arg("columns"), py::arg("sequences"),
        py::arg("tokens"), py::arg("packed"), "Float32 elements that pool_exits needs as workspace.");
  m.def("pool_exits_backward", &pool_exits_backward, py::arg("exits"), py::arg("sequences"), py::arg("tokens"),
        py::arg("mask"), py::arg("cu_seqlens"), py::arg("mode"), py::arg("dtype"), py::arg("prefix_dtype"),
        py::arg("normalize"), py::arg("workspace"), py::arg("stream"), "The same for its backward.");
  m.def("pool_exits_backward_workspace", &pool_exits_backward_workspace, py::arg("columns_of_all_exits"),
        py::arg("sequences"), "Float32 elements that pool_exits_backward needs as workspace.");
}
