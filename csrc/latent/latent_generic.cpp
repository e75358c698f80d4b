#include "latent/kernels.hpp"
#include "qmatmul/kernels.hpp"

namespace fastembed::latent {
namespace generic {
namespace {

constexpr int vector_bytes = 16;
constexpr int tile_rows = 4;

#include "latent/kernels.inl"

}  // namespace
}  // namespace generic

extern const Kernels generic_kernels;
const Kernels generic_kernels = generic::table;

}  // namespace fastembed::latent
