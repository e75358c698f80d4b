#include "search/scalar_codes_kernels.hpp"
#include "search/score.hpp"

namespace fastembed::search::generic {
namespace {

#include "search/scalar_codes.inl"

struct One {
  using Word = uint32_t;
  using Floats = float;
  static constexpr int64_t lanes = 1;

  static Word zero() { return 0; }
  static Word load(const uint32_t* p) { return *p; }
  static Word low_halves(Word a) { return a & 0x0f0f0f0f; }
  static Word high_halves(Word a) { return a >> 4 & 0x0f0f0f0f; }
  static Word four_bytes(const uint8_t* query) {
    uint32_t bytes;
    __builtin_memcpy(&bytes, query, sizeof bytes);
    return bytes;
  }
  static Word add_dot(Word sum, Word codes, Word query) {
    int32_t dot = 0;
    for (int i = 0; i < 4; ++i) {
      dot += static_cast<int32_t>(codes >> (8 * i) & 255) * static_cast<int8_t>(query >> (8 * i));
    }
    return sum + static_cast<uint32_t>(dot);
  }
  static Word add_dot_wide(Word sum, Word codes, Word query) { return add_dot(sum, codes, query); }

  static Floats to_floats(Word a) { return static_cast<float>(static_cast<int32_t>(a)); }
  static Floats load(const float* p) { return *p; }
  static void store(float* p, Floats a) { *p = a; }
  static Floats all(float a) { return a; }
  static Floats add(Floats a, Floats b) { return a + b; }
  static Floats multiply(Floats a, Floats b) { return a * b; }
  static uint32_t above(Floats a, float limit) { return a > limit; }
};

}  // namespace

const ScalarKernels scalar_kernels = {ScalarCodeKernels<One>::scan, nullptr};

}  // namespace fastembed::search::generic
