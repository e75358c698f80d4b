// Which instruction set the kernels of this process use.
//
// Rules that keep one binary safe on every x86-64 machine:
//  - code for a level stands only in files named *_<level>.cpp, compiled with that level's flags (setup.py);
//  - such a file keeps everything but its kernel table in an anonymous namespace and uses no STL, so that the linker
//    can never pick an AVX copy of a function that baseline code calls too;
//  - baseline code reaches the kernels only through the tables below.
#pragma once

#include <string>

namespace fastembed {

// avxvnni stands last because it is on top of avx2 alone: CPUs with AVX-512 have its instruction in another encoding,
// and need not have this one.
enum class Isa { generic, avx2, avx512, avx512vnni, avxvnni };
constexpr int isa_count = 5;

// The level whose kernels serve where a family has none at this one.
constexpr Isa level_below(Isa isa) {
  return isa == Isa::avxvnni ? Isa::avx2 : static_cast<Isa>(static_cast<int>(isa) - 1);
}

// The level in use: the best one the CPU supports, or a lower one asked for by FASTEMBED_ISA. Throws
// std::invalid_argument when FASTEMBED_ISA names no level or one this machine lacks.
Isa active_isa();
// Changes the level in use, for tests that run every level in one process. Throws as active_isa does.
void set_isa(const std::string& name);
// The best level this CPU supports.
Isa best_isa();
bool is_supported(Isa isa);
const char* isa_name(Isa isa);
// Whether bfloat16 dot products may be used: the level in use is avx512vnni, and the CPU has them on top.
bool has_avx512bf16();

// A family's kernels by level; null where the family has none of its own at a level and the one below serves.
template <class Kernels>
struct KernelsByIsa {
  const Kernels* at[isa_count];

  const Kernels& active() const {
    Isa level = active_isa();
    while (at[static_cast<int>(level)] == nullptr) level = level_below(level);
    return *at[static_cast<int>(level)];
  }
};

}  // namespace fastembed
