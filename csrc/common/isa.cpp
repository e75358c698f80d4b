#include "common/isa.hpp"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastembed {
namespace {

constexpr const char* names[isa_count] = {"generic", "avx2", "avx512", "avx512vnni", "avxvnni"};

#if defined(__x86_64__)
// One test for every flag that setup.py compiles a level with. __builtin_cpu_supports also asks the operating system
// whether it saves the wide registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512vnni() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bitalg") &&
         __builtin_cpu_supports("gfni");
}
bool has_avxvnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
#endif

Isa detect() {
  for (Isa isa : {Isa::avx512vnni, Isa::avx512, Isa::avxvnni, Isa::avx2}) {
    if (is_supported(isa)) return isa;
  }
  return Isa::generic;
}

Isa parse(const std::string& name) {
  for (int level = 0; level < isa_count; ++level) {
    if (name != names[level]) continue;
    if (!is_supported(static_cast<Isa>(level))) {
      throw std::invalid_argument("instruction set " + name + " is not supported by this CPU; its best is " +
                                  isa_name(best_isa()));
    }
    return static_cast<Isa>(level);
  }
  throw std::invalid_argument("FASTEMBED_ISA must be generic, avx2, avxvnni, avx512 or avx512vnni, got " + name);
}

Isa initial_isa() {
  const char* asked = std::getenv("FASTEMBED_ISA");
  return asked == nullptr || *asked == '\0' ? best_isa() : parse(asked);
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

bool is_supported(Isa isa) {
  if (isa == Isa::generic) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == Isa::avx2) return has_avx2();
  if (isa == Isa::avxvnni) return has_avxvnni();
  return isa == Isa::avx512 ? has_avx512() : has_avx512vnni();
#else
  return false;
#endif
}

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) { active().store(parse(name), std::memory_order_relaxed); }

bool has_avx512bf16() {
#if defined(__x86_64__)
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  return supported && active_isa() == Isa::avx512vnni;
#else
  return false;
#endif
}

const char* isa_name(Isa isa) { return names[static_cast<int>(isa)]; }

}  // namespace fastembed
