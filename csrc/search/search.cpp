// The searches: how queries and codes are laid out for the kernels, and what their keys mean.

#include "search/search.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "search/blocks.hpp"
#include "search/candidates.hpp"
#include "search/kernels.hpp"
#include "search/levels.hpp"
#include "search/lookups.hpp"
#include "search/schedule.hpp"
#include "search/score.hpp"

namespace fastembed::search {
namespace {

// Rearranging a block for fewer queries costs more than it gains.
constexpr int64_t fewest_packed = 4;

// The largest of some positive floats, 0 of none.
float largest_norm(const float* norms, int64_t count) {
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

// What the searches by Hamming distance share; `finish` is that of Schedule::run, given what the ids are.
template <class Finish>
void search_hamming(const Matrix& queries, const Matrix& codes, const Selection& selection, int64_t k, uint32_t limit,
                    int threads, const Finish& finish) {
  const Kernels& isa = kernels.active();
  const Schedule schedule(queries.rows, codes, selection, k, threads);
  const int64_t words = words_of(codes.bytes);
  const int64_t rows = block_rows(words * 8, isa.bit_lanes);
  const Codes selected(codes, nullptr, 0, selection, rows, schedule.workers());
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
                [&](const Block& block, const float*) { isa.scan_hamming(block, words, group); });
  };
  schedule.run(limit, scan, [&](int64_t query, const uint64_t* entries, int64_t count) {
    return finish(query, entries, count, selected);
  });
}

// What the searches of SDC codes share. A packed code has `words` words of type Word, a packed query
// `query_words` of its own type, a block `rows` codes. Where the kernels have it, a query that is alone
// meets rows as they lie: multiply_rows(rows, query, sums), of which dot products are  constant + 2 sum.
template <class Word, class QueryWord, class Pack, class ScanBlock, class MultiplyRows>
void search_sdc(const SdcMatrix& queries, const SdcMatrix& codes, const Selection& selection, int64_t k, float* scores,
                int64_t* ids, int threads, int64_t words, int64_t rows, const QueryWord* packed_queries,
                int64_t query_words, const int32_t* constants, const Pack& pack, const ScanBlock& scan_block,
                const RowKernels* row_kernels, const MultiplyRows& multiply_rows) {
  const Schedule schedule(queries.codes.rows, codes.codes, selection, k, threads);
  const Codes selected(codes.codes, codes.inverse_norms, 1, selection, rows, schedule.workers());
  const Buffer<Word> blocks(schedule.workers() * rows * words);
  const int64_t sums_room = row_sums_room(rows);
  const Buffer<int32_t> sums(schedule.workers() * sums_room);
  const auto scan = [&](const Batch& batch, const Piece& piece, Candidates* candidates, int64_t worker) {
    if (row_kernels != nullptr && piece.member_count == 1) {
      const uint32_t member = piece.members[0];
      const int64_t query = batch.first_query + member;
      for (int64_t first = piece.first; first < piece.last; first += rows) {
        const int64_t count = std::min(rows, piece.last - first);
        const Codes::Some some = selected.at(first, count, worker);
        int32_t* const of_rows = sums.at(worker * sums_room);
        multiply_rows(some.rows, query, of_rows);
        row_kernels->offer(of_rows, count, static_cast<uint32_t>(first), some.factors, queries.inverse_norms[query],
                           constants[query], candidates[member]);
      }
      return;
    }
    const QueryGroup group = {packed_queries + batch.first_query * query_words,
                              piece.members,
                              piece.member_count,
                              candidates,
                              queries.inverse_norms + batch.first_query,
                              constants + batch.first_query};
    scan_blocks(selected, piece, rows, worker, blocks.at(worker * rows * words), pack,
                [&](Block block, const float* inverse_norms) {
                  block.inverse_norms = inverse_norms;
                  block.largest_inverse_norm = largest_norm(inverse_norms, block.count);
                  scan_block(block, group);
                });
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
  const RowKernels* const row_kernels = kernels_for_one(queries.codes.rows, selection);
  const int64_t words = bits * words_of(codes.codes.bytes / bits);
  const Buffer<uint64_t> packed_queries(queries.codes.rows * words);
  generic::kernels.pack_planes(all_rows(queries.codes), bits, packed_queries.at(0));
  const std::vector<int32_t> largest(queries.codes.rows, static_cast<int32_t>(bits == 1 ? dim : 9 * dim));
  search_sdc<uint64_t>(
      queries, codes, selection, k, scores, ids, threads, words, block_rows(words * 8, isa.bit_lanes),
      packed_queries.at(0), words, largest.data(),
      [&](const Rows& some, uint64_t* block) { isa.pack_planes(some, bits, block); },
      [&](const Block& block, const QueryGroup& group) { isa.scan_planes(block, words, bits, dim, group); },
      row_kernels,
      [&](const Rows& some, int64_t query, int32_t* sums) {
        row_kernels->multiply_planes(some, bits, queries.codes.data + query * queries.codes.stride, sums);
      });
}

// Whether 2 bits are looked up: what it takes to make tables of queries and indices of codes pays where many meet, and
// sums are to fit 16 bits.
bool pays_to_look_up(const Lookups& lookups, const SdcMatrix& queries, const SdcMatrix& codes,
                     const Selection& selection, int64_t groups) {
  constexpr int64_t fewest_queries = 64, fewest_codes = 2048;
  return queries.codes.rows >= fewest_queries && !selection.has_ranges() &&
         (selection.has_ids() ? selection.id_count : codes.codes.rows) >= fewest_codes &&
         groups * lookups.index_bits * 9 <= std::numeric_limits<uint16_t>::max();
}

void search_lookups(const SdcMatrix& queries, const SdcMatrix& codes, const Selection& selection, int64_t dim,
                    const LookupTables& tables, int64_t k, float* scores, int64_t* ids, int threads) {
  constexpr int64_t most_queries = 1024;  // whose tables are in memory at a time
  const Lookups& lookups = *kernels.active().lookups;
  const Buffer<uint8_t> packed_queries(std::min(most_queries, queries.codes.rows) * tables.bytes());
  std::vector<int32_t> constants(std::min(most_queries, queries.codes.rows)), c((dim + 7) / 8 * 8);
  for (int64_t first = 0; first < queries.codes.rows; first += most_queries) {
    SdcMatrix some = queries;
    some.codes.data += first * queries.codes.stride;
    some.codes.rows = std::min(most_queries, queries.codes.rows - first);
    some.inverse_norms += first;
    for (int64_t row = 0; row < some.codes.rows; ++row) {
      read_levels(some.codes.data + row * some.codes.stride, 2, dim, c.data());
      const auto level = [&](int64_t d) { return 2 * c[d] - 3; };
      int64_t sum = tables.write(level, packed_queries.at(row * tables.bytes())) * 2;
      for (int64_t d = 0; d < dim; ++d) sum += level(d);
      constants[row] = static_cast<int32_t>(-3 * sum);
    }
    search_sdc<uint8_t>(
        some, codes, selection, k, scores + first * k, ids + first * k, threads, tables.code_bytes(2), most_lookup_rows,
        packed_queries.at(0), tables.bytes(), constants.data(),
        [&](const Rows& rows, uint8_t* block) { lookups.pack(rows, 2, block); },
        [&](const Block& block, const QueryGroup& group) {
          lookups.scan_two_bits(block, tables.groups(), tables.bytes(), group);
        },
        nullptr, [](const Rows&, int64_t, int32_t*) {});
  }
}

// The bytes that stand for a query in a search by levels, [dim + 1] with a zero at the end, and its constant
// (level_kernels.inl).
int32_t level_query(const uint8_t* code, int64_t dim, int bits, std::vector<int32_t>& c, int8_t* bytes) {
  const int32_t largest = (1 << bits) - 1;
  read_levels(code, bits, dim, c.data());
  int32_t sum = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const int32_t byte = bits <= 4 ? 2 * c[d] - largest : c[d] - (1 << (bits - 1));
    bytes[d] = static_cast<int8_t>(byte);
    sum += byte;
  }
  bytes[dim] = 0;
  const uint32_t constant = static_cast<uint32_t>(-largest) * static_cast<uint32_t>(sum);
  if (bits <= 4) return static_cast<int32_t>(constant);
  return static_cast<int32_t>(2 * constant - static_cast<uint32_t>(largest) * static_cast<uint32_t>(dim));
}

void search_levels(const SdcMatrix& queries, const SdcMatrix& codes, const Selection& selection, int64_t dim, int bits,
                   int64_t k, float* scores, int64_t* ids, int threads) {
  const Kernels& isa = kernels.active();
  const int64_t plane_bytes = codes.codes.bytes / bits;
  const int64_t words = level_words(plane_bytes);
  // With more bits the sum of a code enters its products, which rows do not have beside them.
  const RowKernels* const row_kernels = bits <= 4 ? kernels_for_one(queries.codes.rows, selection) : nullptr;
  const LevelOrder order(words * 8, dim, [&](int64_t index) { return isa.dim_of_level(index, bits > 4); });
  const LevelOrder row_order(row_kernels == nullptr ? 0 : row_level_bytes(plane_bytes), dim,
                             [&](int64_t index) { return row_kernels->dim_of_level(index, bits); });
  const Buffer<uint8_t> packed_queries(queries.codes.rows * order.bytes());
  const Buffer<uint8_t> row_queries(queries.codes.rows * row_order.bytes());
  std::vector<int32_t> constants(queries.codes.rows), c(plane_bytes * 8);
  std::vector<int8_t> bytes(dim + 1);
  for (int64_t row = 0; row < queries.codes.rows; ++row) {
    constants[row] = level_query(queries.codes.data + row * queries.codes.stride, dim, bits, c, bytes.data());
    order.apply(bytes.data(), packed_queries.at(row * order.bytes()));
    row_order.apply(bytes.data(), row_queries.at(row * row_order.bytes()));
  }
  search_sdc<uint32_t>(
      queries, codes, selection, k, scores, ids, threads, level_dwords(words, bits),
      block_rows(level_dwords(words, bits) * 4, isa.level_lanes), packed_queries.at(0), order.bytes(), constants.data(),
      [&](const Rows& some, uint32_t* block) { isa.pack_levels(some, bits, block); },
      [&](const Block& block, const QueryGroup& group) { isa.scan_levels(block, words, bits, group); }, row_kernels,
      [&](const Rows& some, int64_t query, int32_t* sums) {
        row_kernels->multiply_levels(some, bits, row_queries.at(query * row_order.bytes()), sums);
      });
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
  if (const Lookups* const lookups = kernels.active().lookups; bits == 2 && lookups != nullptr) {
    const LookupTables tables(*lookups, dim, lookups_of_levels);
    if (pays_to_look_up(*lookups, queries, codes, selection, tables.groups())) {
      return search_lookups(queries, codes, selection, dim, tables, k, scores, ids, threads);
    }
  }
  if (bits <= 2) {
    search_planes(queries, codes, selection, dim, bits, k, scores, ids, threads);
  } else {
    search_levels(queries, codes, selection, dim, bits, k, scores, ids, threads);
  }
}

}  // namespace fastembed::search
