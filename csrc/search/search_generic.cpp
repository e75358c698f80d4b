#include "search/kernels.hpp"
#include "search/score.hpp"

namespace fastembed::search::generic {
namespace {

#include "search/dwords_generic.inl"
#include "search/level_kernels.inl"
#include "search/level_packing.inl"
#include "search/popcount_kernels.inl"

// Up to 8 bytes, the rest zero.
inline uint64_t load_word(const uint8_t* bytes, int64_t count) {
  uint64_t word = 0;
  __builtin_memcpy(&word, bytes, static_cast<unsigned long>(count));
  return word;
}

struct Word64 {
  using Word = uint64_t;
  static constexpr int64_t lanes = 1;
  static constexpr int64_t query_group = 4;

  static Word zero() { return 0; }
  static Word splat(int64_t a) { return static_cast<Word>(a); }
  static Word load(const uint64_t* p) { return *p; }
  static void store(uint64_t* p, Word a) { *p = a; }
  static Word broadcast(const uint64_t* p) { return *p; }
  static Word add(Word a, Word b) { return a + b; }
  static Word unite(Word a, Word b) { return a | b; }
  static bool any_negative(Word a) { return static_cast<int64_t>(a) < 0; }
  static Word exclusive_or(Word a, Word b) { return a ^ b; }
  static Word exclusive_or(Word a, Word b, Word c) { return a ^ b ^ c; }
  static Word xor_of_and(Word a, Word b, Word c) { return a ^ (b & c); }
  static Word xor_of_or(Word a, Word b, Word c) { return a ^ (b | c); }
  static Word carry(Word sum, Word differ, Word first) { return (differ & ~sum) | (~differ & first); }
  static Word majority(Word a, Word b, Word c) { return (a & b) | (c & (a | b)); }
  static Word carry_of_sums(Word sum, Word a, Word b) { return carry(sum, a ^ b, a); }

  static Word popcount(Word a) {
    a -= a >> 1 & 0x5555555555555555;
    a = (a & 0x3333333333333333) + (a >> 2 & 0x3333333333333333);
    a = (a + (a >> 4)) & 0x0f0f0f0f0f0f0f0f;
    return a * 0x0101010101010101 >> 56;
  }

  static void gather(const uint8_t* row, int64_t, int64_t, int64_t bytes, uint64_t* block, int64_t step) {
    for (int64_t done = 0; done < bytes; done += 8, block += step) {
      *block = load_word(row + done, bytes - done < 8 ? bytes - done : 8);
    }
  }

  static uint32_t below(Word counts, uint32_t limit) { return counts < limit; }
  static void add_lanes(Candidates& candidates, uint32_t, Word count, uint32_t id) {
    add_candidate(candidates, static_cast<uint32_t>(count), id);
  }

  static Dwords::Word to_dwords(Word a) { return static_cast<uint32_t>(a); }
};

struct Planes : Dwords {
  static Word select(uint32_t which, Word a, Word b) { return (which & a) | (~which & b); }
  template <int left>
  static Word shift(Word a) {
    return left >= 0 ? a << (left & 31) : a >> (-left & 31);
  }

  static void gather(const uint8_t* row, int64_t, int64_t, int64_t bytes, uint32_t* block) {
    for (int64_t done = 0; done < bytes; done += 4) {
      *block++ = static_cast<uint32_t>(load_word(row + done, bytes - done < 4 ? bytes - done : 4));
    }
  }
};

using Bits = BitKernels<Word64, Dwords>;
using Levels = LevelKernels<Dwords>;
using Packing = LevelPacking<Planes>;

void scan_rows(const Rows& codes, uint32_t first_id, const uint8_t* query, Candidates& candidates) {
  const int64_t whole = codes.bytes / 8 * 8;
  for (int64_t row = 0; row < codes.count; ++row) {
    const uint8_t* const code = codes.data + row * codes.stride;
    uint64_t distance = 0;
    for (int64_t i = 0; i < whole; i += 8) {
      distance += Word64::popcount(load_word(code + i, 8) ^ load_word(query + i, 8));
    }
    const int64_t tail = codes.bytes - whole;
    distance += Word64::popcount(load_word(code + whole, tail) ^ load_word(query + whole, tail));
    add_candidate(candidates, static_cast<uint32_t>(distance), first_id + static_cast<uint32_t>(row));
  }
}

}  // namespace

const Kernels kernels = {
    Bits::lanes,           Levels::lanes,       scan_rows,         Bits::pack_hamming,
    Bits::scan_hamming,    Bits::pack_planes,   Bits::scan_planes, Packing::pack_levels,
    Packing::dim_of_level, Levels::scan_levels, nullptr,           nullptr,
};

}  // namespace fastembed::search::generic
