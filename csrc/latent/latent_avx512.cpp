#include "latent/kernels.hpp"
#include "qmatmul/kernels.hpp"

namespace fastembed::latent {
namespace avx512 {
namespace {

constexpr int vector_bytes = 64;
constexpr int tile_rows = 14;

#include "latent/kernels.inl"

}  // namespace
}  // namespace avx512

extern const Kernels avx512_kernels;
const Kernels avx512_kernels = avx512::table;

}  // namespace fastembed::latent
