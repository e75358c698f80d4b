#include "latent/kernels.hpp"
#include "qmatmul/kernels.hpp"

namespace fastembed::latent {
namespace avx2 {
namespace {

constexpr int vector_bytes = 32;
constexpr int tile_rows = 6;

#include "latent/kernels.inl"

}  // namespace
}  // namespace avx2

extern const Kernels avx2_kernels;
const Kernels avx2_kernels = avx2::table;

}  // namespace fastembed::latent
