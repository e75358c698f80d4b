#include "pooling/active_kernels.hpp"

#include "common/isa.hpp"

namespace fastembed::pooling {

namespace generic {
const Kernels& kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
#endif

const Kernels& active_kernels() {
#if defined(__x86_64__)
  static const KernelsByIsa<Kernels> by_isa = {{&generic::kernels(), &avx2::kernels(), &avx512::kernels(), nullptr}};
#else
  static const KernelsByIsa<Kernels> by_isa = {{&generic::kernels(), nullptr, nullptr, nullptr}};
#endif
  return by_isa.active();
}

}  // namespace fastembed::pooling
