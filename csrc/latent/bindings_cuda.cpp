#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "common/address.hpp"
#include "latent/latent_cuda.hpp"

namespace py = pybind11;
using namespace fastembed;

namespace {

// Address, and strides of batch, heads and rows in elements.
using MatrixArguments = std::array<int64_t, 4>;

latent::cuda::Matrices matrices(const MatrixArguments& from) {
  return {pointer<const void>(static_cast<uintptr_t>(from[0])), from[1], from[2], from[3]};
}

latent::cuda::Attention attention(int dtype, const std::array<int64_t, 6>& sizes, const MatrixArguments& query,
                                  const MatrixArguments& key, const MatrixArguments& value,
                                  const std::array<int64_t, 3>& keep, float scale) {
  const auto [batch, heads, queries, keys, features, value_features] = sizes;
  const latent::cuda::Keep kept{pointer<const uint8_t>(static_cast<uintptr_t>(keep[0])), keep[1], keep[2]};
  return {static_cast<DType>(dtype), batch,         heads,           queries, keys, features, value_features,
          matrices(query),           matrices(key), matrices(value), kept,    scale};
}

void attend(int dtype, const std::array<int64_t, 6>& sizes, const MatrixArguments& query, const MatrixArguments& key,
            const MatrixArguments& value, const std::array<int64_t, 3>& keep, float scale, uintptr_t out, uintptr_t lse,
            uintptr_t stream) {
  const auto call = attention(dtype, sizes, query, key, value, keep, scale);
  py::gil_scoped_release release;
  latent::cuda::attend(call, pointer<void>(out), pointer<float>(lse), pointer<void>(stream));
}

void attend_backward(int dtype, const std::array<int64_t, 6>& sizes, const MatrixArguments& query,
                     const MatrixArguments& key, const MatrixArguments& value, const std::array<int64_t, 3>& keep,
                     float scale, const MatrixArguments& grad, uintptr_t lse, uintptr_t deltas, uintptr_t query_grad,
                     uintptr_t key_grad, uintptr_t value_grad, uintptr_t stream) {
  const auto call = attention(dtype, sizes, query, key, value, keep, scale);
  py::gil_scoped_release release;
  latent::cuda::attend_backward(call, matrices(grad), pointer<const float>(lse), pointer<const float>(deltas),
                                pointer<void>(query_grad), pointer<void>(key_grad), pointer<void>(value_grad),
                                pointer<void>(stream));
}

}  // namespace

void bind_latent_cuda(py::module_& m) {
  m.def("latent_attention", &attend,
        "Attention on a stream; arguments checked by fastembed/ops/latent_attention.py, addresses on the device.");
  m.def("latent_attention_backward", &attend_backward, "Its gradients, likewise.");
  m.attr("latent_forward_columns") = latent::cuda::forward_columns;
  m.attr("latent_backward_columns") = latent::cuda::backward_columns;
}
