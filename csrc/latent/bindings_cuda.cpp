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
  return {static_cast<DType>(dtype), batch,         heads,           queries, keys,  features, value_features,
          matrices(query),           matrices(key), matrices(value), kept,    scale, nullptr,  1};
}

void attend(int dtype, const std::array<int64_t, 6>& sizes, const MatrixArguments& query, const MatrixArguments& key,
            const MatrixArguments& value, const std::array<int64_t, 3>& keep, float scale, uintptr_t out, uintptr_t lse,
            uintptr_t stream) {
  const auto call = attention(dtype, sizes, query, key, value, keep, scale);
  py::gil_scoped_release release;
  latent::cuda::attend(call, pointer<void>(out), pointer<float>(lse), pointer<void>(stream));
}

void attend_folded(int dtype, const std::array<int64_t, 6>& sizes, const MatrixArguments& query,
                   const MatrixArguments& key, const MatrixArguments& value, const std::array<int64_t, 3>& keep,
                   float scale, uintptr_t bias, int64_t heads_each, uintptr_t out, uintptr_t stream) {
  auto call = attention(dtype, sizes, query, key, value, keep, scale);
  call.bias = pointer<const float>(bias);
  call.heads_each = heads_each;
  py::gil_scoped_release release;
  latent::cuda::attend_folded(call, pointer<float>(out), pointer<void>(stream));
}

void gated_means(int dtype, uintptr_t values, uintptr_t gates, int64_t stride, uintptr_t value_bias,
                 uintptr_t gate_bias, int64_t tokens, int64_t features, uintptr_t offsets, int64_t sequences,
                 uintptr_t means, int64_t means_stride, uintptr_t stream) {
  const latent::cuda::Gated gated{static_cast<DType>(dtype),
                                  pointer<const void>(values),
                                  pointer<const void>(gates),
                                  stride,
                                  pointer<const float>(value_bias),
                                  pointer<const float>(gate_bias),
                                  tokens,
                                  features,
                                  pointer<const int64_t>(offsets),
                                  sequences,
                                  pointer<float>(means),
                                  means_stride};
  py::gil_scoped_release release;
  latent::cuda::gated_means(gated, pointer<void>(stream));
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
  m.def("latent_attend_folded", &attend_folded, "The folded heads of latent pooling; see fastembed/ops/latent.py.");
  m.def("latent_gated_means", &gated_means, "What is left of its feed-forward, likewise.");
  m.attr("latent_rows_16_bit") = latent::cuda::rows_16_bit;
  m.attr("latent_rows_float32") = latent::cuda::rows_float32;
  m.def("latent_forward_columns", &latent::cuda::forward_columns,
        "Keys whose sums are made in one go on the current device.");
  m.attr("latent_backward_columns") = latent::cuda::backward_columns;
}
