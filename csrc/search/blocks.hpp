// What the searches share: the kernels in use, and the selected codes a block at a time. For baseline code only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "common/isa.hpp"
#include "search/kernels.hpp"
#include "search/schedule.hpp"
#include "search/search.hpp"

namespace fastembed::search {

#if defined(__x86_64__)
inline constexpr KernelsByIsa<Kernels> kernels = {{&generic::kernels, &avx2::kernels, nullptr, &avx512vnni::kernels}};
#else
inline constexpr KernelsByIsa<Kernels> kernels = {{&generic::kernels, nullptr, nullptr, nullptr}};
#endif

// The kernels for a query that is alone with codes, where there are any and that can be.
inline const RowKernels* kernels_for_one(int64_t queries, const Selection& selection) {
  return queries == 1 || selection.has_ranges() ? kernels.active().rows : nullptr;
}

// Codes that a block holds: they and the queries they meet stay in the first-level cache.
constexpr int64_t block_bytes = 32 << 10;

// Memory on cache lines, so that no load of a register straddles two. It is not cleared: pages nobody writes cost
// nothing.
template <class T>
struct Buffer {
  static constexpr std::align_val_t alignment{64};
  struct Delete {
    void operator()(T* memory) const { ::operator delete(memory, alignment); }
  };

  explicit Buffer(int64_t size)
      : data(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), alignment))) {}
  T* at(int64_t index) const { return data.get() + index; }

  std::unique_ptr<T, Delete> data;
};

inline Rows all_rows(const Matrix& matrix) { return {matrix.data, matrix.stride, matrix.rows, matrix.bytes}; }

// Codes of a block of packed codes of `bytes` each, a whole number of groups of `lanes`.
inline int64_t block_rows(int64_t bytes, int64_t lanes) {
  return std::max<int64_t>(1, block_bytes / std::max<int64_t>(1, bytes * lanes)) * lanes;
}

// The selected codes by position: where they lie, or where listed ids are not adjacent, copied together for a block.
class Codes {
 public:
  struct Some {
    Rows rows;
    const float* factors;
  };
  struct Bytes {
    const uint8_t* data;
    int64_t count;
  };

  // `factors` [codes, factor_count]: what stands beside each code.
  Codes(const Matrix& codes, const float* factors, int64_t factor_count, const Selection& selection, int64_t block,
        int workers)
      : codes_(codes),
        factors_(factors),
        factor_count_(factor_count),
        ids_(selection.has_ids() ? selection.ids : nullptr),
        block_(block),
        rows_(ids_ == nullptr ? 0 : workers * block * codes.bytes),
        gathered_(ids_ == nullptr ? 0 : workers * block * factor_count) {}

  // Positions that `at` may be asked for at once: a block for several queries, so that the first one fetches it for
  // all.
  int64_t most(int64_t queries) const {
    return ids_ == nullptr && queries == 1 ? std::numeric_limits<int64_t>::max() : block_;
  }

  // The memory of some positions if it is in one piece, else nothing.
  Bytes adjacent_bytes(int64_t first, int64_t count) const {
    if (count <= 0 || codes_.stride != codes_.bytes || !are_adjacent(first, count)) return {codes_.data, 0};
    return {codes_.data + row(first) * codes_.stride, count * codes_.bytes};
  }

  Some at(int64_t first, int64_t count, int64_t worker) const {
    if (are_adjacent(first, count)) {
      const int64_t row = this->row(first);
      return {{codes_.data + row * codes_.stride, codes_.stride, count, codes_.bytes}, factors_ + row * factor_count_};
    }
    uint8_t* const rows = rows_.at(worker * block_ * codes_.bytes);
    float* const factors = gathered_.at(worker * block_ * factor_count_);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t id = ids_[first + i];
      std::memcpy(rows + i * codes_.bytes, codes_.data + id * codes_.stride, codes_.bytes);
      for (int64_t j = 0; j < factor_count_; ++j) factors[i * factor_count_ + j] = factors_[id * factor_count_ + j];
    }
    return {{rows, codes_.bytes, count, codes_.bytes}, factors};
  }

  int64_t id(uint64_t entry) const { return row(id_of(entry)); }

 private:
  int64_t row(int64_t position) const { return ids_ == nullptr ? position : ids_[position]; }
  bool are_adjacent(int64_t first, int64_t count) const { return row(first + count - 1) - row(first) == count - 1; }

  const Matrix& codes_;
  const float* factors_;
  int64_t factor_count_;
  const int64_t* ids_;
  int64_t block_;
  Buffer<uint8_t> rows_;
  Buffer<float> gathered_;
};

// Packs the codes of a piece block by block, and hands each block to scan_block(block, factors of its codes).
template <class Word, class Pack, class ScanBlock>
void scan_blocks(const Codes& codes, const Piece& piece, int64_t rows, int64_t worker, Word* packed, const Pack& pack,
                 const ScanBlock& scan_block) {
  for (int64_t first = piece.first; first < piece.last; first += rows) {
    const int64_t count = std::min(rows, piece.last - first);
    const Codes::Some some = codes.at(first, count, worker);
    pack(some.rows, packed);
    const Codes::Bytes next = codes.adjacent_bytes(first + count, std::min(rows, piece.last - first - count));
    scan_block(Block{packed, count, static_cast<uint32_t>(first), nullptr, 0, next.data, next.count}, some.factors);
  }
}

}  // namespace fastembed::search
