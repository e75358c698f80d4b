// One 32-bit lane: four bytes, an integer or a float. Included in the anonymous namespace of the level, after
// search/kernels.hpp and search/score.hpp.

struct Dwords {
  using Word = uint32_t;
  using Floats = float;
  static constexpr int64_t lanes = 1;

  static Word load(const uint32_t* p) { return *p; }
  static void store(uint32_t* p, Word a) { *p = a; }
  static Word zero() { return 0; }
  static Word splat(int32_t a) { return static_cast<uint32_t>(a); }
  static Word add(Word a, Word b) { return a + b; }
  static Word subtract(Word a, Word b) { return a - b; }
  static Word intersect(Word a, Word b) { return a & b; }
  // Whether a lane is 0 or more.
  static bool any_positive(Word a) { return static_cast<int32_t>(a) >= 0; }

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
  // Groups of codes that `queries` queries meet at once.
  static constexpr int row_groups(int) { return 1; }

  static Floats to_floats(Word a) { return static_cast<float>(static_cast<int32_t>(a)); }
  static Floats load(const float* p) { return *p; }
  static Floats load(const float* p, int64_t) { return *p; }
  // Four floats each of as many codes as there are lanes, parted.
  static void load_four(const float* p, Floats (&parted)[4]) {
    for (int i = 0; i < 4; ++i) parted[i] = p[i];
  }
  static void store(float* p, Floats a) { *p = a; }
  static Floats all(float a) { return a; }
  static Floats add(Floats a, Floats b) { return a + b; }
  static Floats multiply(Floats a, Floats b) { return a * b; }
  static uint32_t above(Floats a, float limit) { return a > limit; }
  static void add_scores(Candidates& candidates, uint32_t, Floats score, uint32_t id) {
    add_candidate(candidates, key_of_score(score), id);
  }
};

#include "search/byte_products.inl"
