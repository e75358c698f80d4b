// Codes of several bits as integers, and their order in packed queries. For baseline code only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastembed::search {

// The unsigned integers of a code: c[ceil(dim / 8) * 8].
inline void read_levels(const uint8_t* code, int bits, int64_t dim, int32_t* c) {
  const int64_t plane_bytes = (dim + 7) / 8;
  std::fill_n(c, plane_bytes * 8, 0);
  for (int plane = 0; plane < bits; ++plane) {
    for (int64_t i = 0; i < plane_bytes; ++i, ++code) {
      for (int bit = 0; bit < 8; ++bit) c[8 * i + bit] = 2 * c[8 * i + bit] + (*code >> (7 - bit) & 1);
    }
  }
}

// A packed query: which of `dim` numbers stands in each of its bytes.
class LevelOrder {
 public:
  // Byte `index` takes number dim_of(index).
  template <class DimOf>
  LevelOrder(int64_t bytes, int64_t dim, const DimOf& dim_of) : dims_(bytes) {
    for (int64_t index = 0; index < bytes; ++index) dims_[index] = static_cast<int32_t>(std::min(dim, dim_of(index)));
  }
  int64_t bytes() const { return static_cast<int64_t>(dims_.size()); }
  // values[dim] is what stands beyond the last number.
  void apply(const int8_t* values, uint8_t* out) const {
    for (const int32_t d : dims_) *out++ = static_cast<uint8_t>(values[d]);
  }

 private:
  std::vector<int32_t> dims_;
};

}  // namespace fastembed::search
