// The Python module fastembed._core: pointers, shapes and strides in, kernels called with the GIL released. Arguments
// are checked in Python (fastembed/ops); what is checked here is only what needs the values themselves.
#include <pybind11/pybind11.h>

#include <cstdlib>

#include "common/isa.hpp"
#include "common/threading.hpp"

namespace py = pybind11;

// One per family, in csrc/<family>/bindings.cpp.
void bind_pooling(py::module_& m);
void bind_qmatmul(py::module_& m);
void bind_fde(py::module_& m);
void bind_latent(py::module_& m);
void bind_scalar_codes(py::module_& m);
void bind_search(py::module_& m);

PYBIND11_MODULE(_core, m) {
  m.def("isa", [] { return fastembed::isa_name(fastembed::active_isa()); }, "Instruction-set level in use.");
  m.def("best_isa", [] { return fastembed::isa_name(fastembed::best_isa()); }, "Best level this CPU supports.");
  m.def(
      "isa_levels",
      [] {
        py::list names;
        for (int level = 0; level < fastembed::isa_count; ++level) {
          const auto isa = static_cast<fastembed::Isa>(level);
          if (fastembed::is_supported(isa)) names.append(fastembed::isa_name(isa));
        }
        return names;
      },
      "Levels this CPU supports, each after those it is built on.");
  m.def("set_isa", &fastembed::set_isa, py::arg("name"), "Change the level in use (for tests).");
  m.def("max_threads", [] { return omp_get_max_threads(); }, "Threads OpenMP would use for a parallel region.");
  m.def(
      "requested_backend",
      [] {
        const char* name = std::getenv("FASTEMBED_BACKEND");
        return name == nullptr ? "" : name;
      },
      "FASTEMBED_BACKEND, or nothing; os.environ would take longer than a small kernel to say so.");
  bind_pooling(m);
  bind_qmatmul(m);
  bind_fde(m);
  bind_latent(m);
  bind_scalar_codes(m);
  bind_search(m);
}
