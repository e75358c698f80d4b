#include <immintrin.h>

#include "latent/kernels.hpp"
#include "qmatmul/kernels.hpp"

namespace fastembed::latent {
namespace avx512 {
namespace {

#include "latent/avx512.inl"

}  // namespace
}  // namespace avx512

extern const Kernels avx512_kernels;
const Kernels avx512_kernels = avx512::table;

}  // namespace fastembed::latent
