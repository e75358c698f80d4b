// The searches: how queries and codes are laid out for the kernels, and what their keys mean.

#include "search/search.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "common/isa.hpp"
#include "search/candidates.hpp"
#include "search/kernels.hpp"
#include "search/schedule.hpp"
#include "search/score.hpp"

namespace fastembed::search {
namespace {

#if defined(__x86_64__)
constexpr KernelsByIsa<Kernels> kernels = {{&generic::kernels, &avx2::kernels, nullptr, &avx512vnni::kernels}};
#else
constexpr KernelsByIsa<Kernels> kernels = {{&generic::kernels, nullptr, nullptr, nullptr}};
#endif

// Codes that a block holds: they and the queries they meet stay in the first-level cache.
constexpr int64_t block_bytes = 32 << 10;
// Rearranging a block for fewer queries costs more than it gains.
constexpr int64_t fewest_packed = 4;

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

Rows all_rows(const Matrix& matrix) { return {matrix.data, matrix.stride, matrix.rows, matrix.bytes}; }

// Codes of a block of packed codes of `bytes` each, a whole number of groups of `lanes`.
int64_t block_rows(int64_t bytes, int64_t lanes) {
  return std::max<int64_t>(1, block_bytes / std::max<int64_t>(1, bytes * lanes)) * lanes;
}

// The selected codes by position: where they lie, or where listed ids are not adjacent, copied together for a block.
class Codes {
 public:
  struct Some {
    Rows rows;
    const float* inverse_norms;
  };
  struct Bytes {
    const uint8_t* data;
    int64_t count;
  };

  Codes(const Matrix& codes, const float* inverse_norms, const Selection& selection, int64_t block, int workers)
      : codes_(codes),
        inverse_norms_(inverse_norms),
        ids_(selection.has_ids() ? selection.ids : nullptr),
        block_(block),
        rows_(ids_ == nullptr ? 0 : workers * block * codes.bytes),
        norms_(ids_ == nullptr || inverse_norms == nullptr ? 0 : workers * block) {}

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
      return {{codes_.data + row * codes_.stride, codes_.stride, count, codes_.bytes},
              inverse_norms_ == nullptr ? nullptr : inverse_norms_ + row};
    }
    uint8_t* const rows = rows_.at(worker * block_ * codes_.bytes);
    float* const norms = inverse_norms_ == nullptr ? nullptr : norms_.at(worker * block_);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t id = ids_[first + i];
      std::memcpy(rows + i * codes_.bytes, codes_.data + id * codes_.stride, codes_.bytes);
      if (norms != nullptr) norms[i] = inverse_norms_[id];
    }
    return {{rows, codes_.bytes, count, codes_.bytes}, norms};
  }

  int64_t id(uint64_t entry) const { return row(id_of(entry)); }

 private:
  int64_t row(int64_t position) const { return ids_ == nullptr ? position : ids_[position]; }
  bool are_adjacent(int64_t first, int64_t count) const { return row(first + count - 1) - row(first) == count - 1; }

  const Matrix& codes_;
  const float* inverse_norms_;
  const int64_t* ids_;
  int64_t block_;
  Buffer<uint8_t> rows_;
  Buffer<float> norms_;
};

// The largest of some positive floats, 0 of none.
float largest_norm(const float* norms, int64_t count) {
  if (norms == nullptr) return 0;
  int32_t largest = 0;  // the bits of positive floats order as they do
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, norms + i, sizeof bits);
    largest = std::max(largest, bits);
  }
  float norm;
  std::memcpy(&norm, &largest, sizeof norm);
  return norm;
}

// Packs the codes of a piece block by block, and hands each block to scan_block(block).
template <class Word, class Pack, class ScanBlock>
void scan_blocks(const Codes& codes, const Piece& piece, int64_t rows, int64_t worker, Word* packed, const Pack& pack,
                 const ScanBlock& scan_block) {
  for (int64_t first = piece.first; first < piece.last; first += rows) {
    const int64_t count = std::min(rows, piece.last - first);
    const Codes::Some some = codes.at(first, count, worker);
    pack(some.rows, packed);
    const Codes::Bytes next = codes.adjacent_bytes(first + count, std::min(rows, piece.last - first - count));
    scan_block(Block{packed, count, static_cast<uint32_t>(first), some.inverse_norms,
                     largest_norm(some.inverse_norms, count), next.data, next.count});
  }
}

// What the searches by Hamming distance share; `finish` is that of Schedule::run, given what the ids are.
template <class Finish>
void search_hamming(const Matrix& queries, const Matrix& codes, const Selection& selection, int64_t k, uint32_t limit,
                    int threads, const Finish& finish) {
  const Kernels& isa = kernels.active();
  const Schedule schedule(queries.rows, codes, selection, k, threads);
  const int64_t words = words_of(codes.bytes);
  const int64_t rows = block_rows(words * 8, isa.bit_lanes);
  const Codes selected(codes, nullptr, selection, rows, schedule.workers());
  const Buffer<uint64_t> blocks(schedule.workers() * rows * words);
  const Buffer<uint64_t> packed_queries(queries.rows * words);
  generic::kernels.pack_hamming(all_rows(queries), packed_queries.at(0));

  const auto scan = [&](const Batch& batch, const Piece& piece, Candidates* candidates, int64_t worker) {
    if (piece.member_count < fewest_packed) {
      for (int64_t first = piece.first; first < piece.last;) {
        const int64_t count = std::min(selected.most(piece.member_count), piece.last - first);
        const Codes::Some some = selected.at(first, count, worker);
        for (int64_t i = 0; i < piece.member_count; ++i) {
          const uint32_t query = piece.members[i];
          isa.scan_rows(some.rows, static_cast<uint32_t>(first),
                        queries.data + (batch.first_query + query) * queries.stride, candidates[query]);
        }
        first += count;
      }
      return;
    }
    const QueryGroup group = {
        packed_queries.at(batch.first_query * words), piece.members, piece.member_count, candidates, nullptr, nullptr};
    scan_blocks(selected, piece, rows, worker, blocks.at(worker * rows * words), isa.pack_hamming,
                [&](const Block& block) { isa.scan_hamming(block, words, group); });
  };
  schedule.run(limit, scan, [&](int64_t query, const uint64_t* entries, int64_t count) {
    return finish(query, entries, count, selected);
  });
}

// What SDC by bit planes and by levels share. A packed code has `words` words of type Word, a packed query
// `query_words` of its own type, `lanes` codes stand side by side.
template <class Word, class QueryWord, class Pack, class ScanBlock>
void search_sdc(const SdcMatrix& queries, const SdcMatrix& codes, const Selection& selection, int64_t k, float* scores,
                int64_t* ids, int threads, int64_t words, int64_t lanes, const QueryWord* packed_queries,
                int64_t query_words, const int32_t* constants, const Pack& pack, const ScanBlock& scan_block) {
  const Schedule schedule(queries.codes.rows, codes.codes, selection, k, threads);
  const int64_t rows = block_rows(words * static_cast<int64_t>(sizeof(Word)), lanes);
  const Codes selected(codes.codes, codes.inverse_norms, selection, rows, schedule.workers());
  const Buffer<Word> blocks(schedule.workers() * rows * words);
  const auto scan = [&](const Batch& batch, const Piece& piece, Candidates* candidates, int64_t worker) {
    const QueryGroup group = {packed_queries + batch.first_query * query_words,
                              piece.members,
                              piece.member_count,
                              candidates,
                              queries.inverse_norms + batch.first_query,
                              constants == nullptr ? nullptr : constants + batch.first_query};
    scan_blocks(selected, piece, rows, worker, blocks.at(worker * rows * words), pack,
                [&](const Block& block) { scan_block(block, group); });
  };
  const uint32_t limit = key_of_score(-std::numeric_limits<float>::infinity());
  schedule.run(limit, scan, [&](int64_t query, const uint64_t* entries, int64_t count) {
    for (int64_t rank = 0; rank < k; ++rank) {
      const bool found = rank < count;
      scores[query * k + rank] = found ? score_of_key(key_of(entries[rank])) : -std::numeric_limits<float>::infinity();
      ids[query * k + rank] = found ? selected.id(entries[rank]) : -1;
    }
    return true;
  });
}

void search_planes(const SdcMatrix& queries, const SdcMatrix& codes, const Selection& selection, int64_t dim, int bits,
                   int64_t k, float* scores, int64_t* ids, int threads) {
  const Kernels& isa = kernels.active();
  const int64_t words = bits * words_of(codes.codes.bytes / bits);
  const Buffer<uint64_t> packed_queries(queries.codes.rows * words);
  generic::kernels.pack_planes(all_rows(queries.codes), bits, packed_queries.at(0));
  search_sdc<uint64_t>(
      queries, codes, selection, k, scores, ids, threads, words, isa.bit_lanes, packed_queries.at(0), words, nullptr,
      [&](const Rows& some, uint64_t* block) { isa.pack_planes(some, bits, block); },
      [&](const Block& block, const QueryGroup& group) { isa.scan_planes(block, words, bits, dim, group); });
}

// The bytes that stand for a query in a search by levels; returns its constant (level_kernels.inl).
int32_t level_query(const uint8_t* code, int64_t plane_bytes, int64_t dim, int bits, int64_t words, int8_t* bytes) {
  const uint32_t largest = (1u << bits) - 1;
  uint32_t sum = 0;
  for (int64_t index = 0; index < words * 8; ++index) {
    const int64_t d = dim_of_level(index);
    int c = 0;
    for (int plane = 0; plane < bits && d < dim; ++plane) {
      c = 2 * c + (code[plane * plane_bytes + d / 8] >> (7 - d % 8) & 1);
    }
    const int byte = d >= dim ? 0 : bits <= 4 ? 2 * c - static_cast<int>(largest) : c - (1 << (bits - 1));
    bytes[index] = static_cast<int8_t>(byte);
    sum += static_cast<uint32_t>(byte);
  }
  if (bits <= 4) return static_cast<int32_t>(-largest * sum);
  return static_cast<int32_t>(-2 * largest * sum - largest * static_cast<uint32_t>(dim));
}

void search_levels(const SdcMatrix& queries, const SdcMatrix& codes, const Selection& selection, int64_t dim, int bits,
                   int64_t k, float* scores, int64_t* ids, int threads) {
  const Kernels& isa = kernels.active();
  const int64_t plane_bytes = codes.codes.bytes / bits;
  const int64_t words = level_words(plane_bytes);
  const Buffer<int8_t> packed_queries(queries.codes.rows * words * 8);
  const Buffer<int32_t> constants(queries.codes.rows);
  for (int64_t row = 0; row < queries.codes.rows; ++row) {
    *constants.at(row) = level_query(queries.codes.data + row * queries.codes.stride, plane_bytes, dim, bits, words,
                                     packed_queries.at(row * words * 8));
  }
  search_sdc<uint32_t>(
      queries, codes, selection, k, scores, ids, threads, level_dwords(words, bits), isa.level_lanes,
      packed_queries.at(0), words * 8, constants.at(0),
      [&](const Rows& some, uint32_t* block) { isa.pack_levels(some, bits, block); },
      [&](const Block& block, const QueryGroup& group) { isa.scan_levels(block, words, bits, group); });
}

}  // namespace

void hamming_topk(const Matrix& queries, const Matrix& codes, const Selection& selection, int64_t k, int32_t* distances,
                  int64_t* ids, int threads) {
  if (queries.rows == 0) return;
  const auto finish = [&](int64_t query, const uint64_t* entries, int64_t count, const Codes& selected) {
    for (int64_t rank = 0; rank < k; ++rank) {
      const bool found = rank < count;
      distances[query * k + rank] = found ? static_cast<int32_t>(key_of(entries[rank])) : INT32_MAX;
      ids[query * k + rank] = found ? selected.id(entries[rank]) : -1;
    }
    return true;
  };
  search_hamming(queries, codes, selection, k, std::numeric_limits<uint32_t>::max(), threads, finish);
}

RangeResult hamming_range(const Matrix& queries, const Matrix& codes, const Selection& selection, int64_t radius,
                          int threads) {
  RangeResult result;
  result.lims.resize(queries.rows + 1);
  result.found.resize(queries.rows);
  if (queries.rows == 0) return result;
  const auto finish = [&](int64_t query, const uint64_t* entries, int64_t count, const Codes& selected) {
    result.found[query].reset(new (std::nothrow) uint64_t[count]);
    if (result.found[query] == nullptr) return false;
    for (int64_t i = 0; i < count; ++i) {
      result.found[query][i] =
          static_cast<uint64_t>(key_of(entries[i])) << 32 | static_cast<uint64_t>(selected.id(entries[i]));
    }
    result.lims[query + 1] = count;
    return true;
  };
  const int64_t limit = std::min<int64_t>(radius, 8 * codes.bytes) + 1;
  search_hamming(queries, codes, selection, 0, static_cast<uint32_t>(limit), threads, finish);
  for (int64_t query = 0; query < queries.rows; ++query) result.lims[query + 1] += result.lims[query];
  return result;
}

void RangeResult::write(int32_t* distances, int64_t* ids) const {
  for (size_t query = 0; query < found.size(); ++query) {
    for (int64_t i = 0; i < lims[query + 1] - lims[query]; ++i) {
      *distances++ = static_cast<int32_t>(key_of(found[query][i]));
      *ids++ = id_of(found[query][i]);
    }
  }
}

void sdc_topk(const SdcMatrix& queries, const SdcMatrix& codes, const Selection& selection, int64_t dim, int bits,
              int64_t k, float* scores, int64_t* ids, int threads) {
  if (queries.codes.rows == 0) return;
  if (bits <= 2) {
    search_planes(queries, codes, selection, dim, bits, k, scores, ids, threads);
  } else {
    search_levels(queries, codes, selection, dim, bits, k, scores, ids, threads);
  }
}

}  // namespace fastembed::search
