// The tables of queries whose products are looked up. For baseline code only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/divide_up.hpp"
#include "search/kernels.hpp"

namespace fastembed::search {

class LookupTables {
 public:
  // Of numbers for `dim` dimensions, `at_once` look-ups summed at once.
  LookupTables(const Lookups& kernels, int64_t dim, int64_t at_once)
      : index_bits_(kernels.index_bits),
        dim_(dim),
        groups_(divide_up(divide_up(dim, 8) * 8, index_bits_ * at_once) * at_once) {}

  int64_t groups() const { return groups_; }
  // Of the tables, and of a code with so many planes in a block.
  int64_t bytes() const { return groups_ << index_bits_; }
  int64_t code_bytes(int planes) const { return planes * divide_up(groups_, lookup_chunk) * lookup_chunk; }

  // Tables of number(d) for dimension d. Returns what is to be taken off a sum of look-ups.
  template <class Number>
  int64_t write(const Number& number, uint8_t* out) const {
    constexpr uint64_t each = 0x0101010101010101;
    int64_t taken = 0;
    for (int64_t first = 0; first < groups_ * index_bits_; first += index_bits_) {
      int numbers[8] = {}, least = 0;
      for (int64_t bit = 0; bit < index_bits_; ++bit) {
        const int64_t p = first + bit, d = p / 8 * 8 + 7 - p % 8;
        if (d < dim_) numbers[bit] = number(d);
        least += std::min(0, numbers[bit]);
      }
      taken -= least;
      // Eight entries are added to as one word: in the end none of them is negative.
      uint64_t words[8] = {each * static_cast<uint64_t>(-least)};
      for (int64_t bit = 0; bit < index_bits_; ++bit) {
        const auto added = static_cast<uint64_t>(numbers[bit]);
        if (bit < 3) {
          words[0] += added * with_bit[bit];
        } else {
          for (int64_t i = 0; i < int64_t{1} << (bit - 3); ++i) {
            words[(int64_t{1} << (bit - 3)) + i] = words[i] + added * each;
          }
        }
      }
      std::memcpy(out, words, int64_t{1} << index_bits_);
      out += int64_t{1} << index_bits_;
    }
    return taken;
  }

 private:
  // A one in each byte whose number has a bit set.
  static constexpr uint64_t with_bit[] = {0x0100010001000100, 0x0101000001010000, 0x0101010100000000};

  int64_t index_bits_, dim_, groups_;
};

}  // namespace fastembed::search
