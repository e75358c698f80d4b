// The search over scalar codes: how queries, codes and what stands beside them are laid out for the kernels.

#include "search/scalar_codes.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "search/blocks.hpp"
#include "search/levels.hpp"
#include "search/lookups.hpp"
#include "search/scalar_codes_kernels.hpp"
#include "search/score.hpp"

namespace fastembed::search {
namespace {

#if defined(__x86_64__)
constexpr KernelsByIsa<ScalarKernels> scalar_kernels = {
    {&generic::scalar_kernels, &avx2::scalar_kernels, nullptr, &avx512vnni::scalar_kernels}};
#else
constexpr KernelsByIsa<ScalarKernels> scalar_kernels = {{&generic::scalar_kernels, nullptr, nullptr, nullptr}};
#endif

// Bits of s that one byte holds; the rest stands in a byte of its own.
constexpr int part_bits = 8;
constexpr int second_part_bits = 7;

// Queries that are prepared at a time: no more meet a block together.
constexpr int64_t most_queries = 1024;

// s = c - 2^(bits - 1) of every dimension of a query.
void read_query(const uint8_t* code, int bits, int64_t dim, int* s) {
  read_levels(code, bits, dim, s);
  for (int64_t d = 0; d < dim; ++d) s[d] -= 1 << (bits - 1);
}

// What else the score takes of a query, moved from c to s.
ScalarQuery query_factors_of(const float* factors, int bits, int64_t dim, const int* s) {
  int64_t sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += s[d];
  const float lower = factors[0], step = factors[1];
  // A zero added to -0 leaves 0, so that no score is -0, which would rank below 0.
  return {step, lower + step * static_cast<float>(1 << (bits - 1)), static_cast<float>(sum), factors[3] + 0.0f};
}

// One way to multiply codes by queries: what becomes of queries, and what of the codes of a block.
class Products {
 public:
  Products(const ScalarMatrix& queries, const ScalarMatrix& codes, const Selection& selection, int64_t dim)
      : dim_(dim), bits_(codes.bits), plane_bytes_((dim + 7) / 8), lookups_(kernels.active().lookups) {
    // A look-up multiplies the bits of one plane by half a byte, for many codes at once. One or two for each bit take
    // less time than products of bytes do.
    const int half_bytes = (queries.bits + half_byte_bits - 1) / half_byte_bits;
    row_parts_ = queries.bits <= part_bits ? 1 : 2;
    if (const RowKernels* const by_row = kernels_for_one(queries.codes.rows, selection)) {
      row_order_ = std::make_unique<LevelOrder>(row_level_bytes(plane_bytes_), dim_,
                                                [&](int64_t index) { return by_row->dim_of_level(index, bits_); });
    }
    if (lookups_ != nullptr && queries.bits <= part_bits && codes.bits * half_bytes <= 2) {
      tables_ = std::make_unique<LookupTables>(*lookups_, dim, lookups_of_halves);
      parts_ = half_bytes;
      part_bytes_ = tables_->bytes();
      code_bytes_ = tables_->code_bytes(bits_);
      rows_ = most_lookup_rows;
    } else {
      parts_ = row_parts_;
      words_ = level_words(plane_bytes_);
      const auto dim_of = [&](int64_t index) { return kernels.active().dim_of_level(index, bits_ > 4); };
      order_ = std::make_unique<LevelOrder>(words_ * 8, dim_, dim_of);
      part_bytes_ = order_->bytes();
      code_bytes_ = level_dwords(words_, bits_) * static_cast<int64_t>(sizeof(uint32_t));
      rows_ = block_rows(code_bytes_, kernels.active().level_lanes);
    }
  }

  int64_t query_bytes() const { return parts_ * part_bytes_; }
  int64_t row_query_bytes() const { return row_order_ == nullptr ? 0 : row_parts_ * row_order_->bytes(); }
  int64_t part_bytes() const { return part_bytes_; }
  // Of a block, and codes in it.
  int64_t block_bytes() const { return rows_ * code_bytes_; }
  int64_t rows() const { return rows_; }

  // Returns the bias of look-ups.
  int32_t prepare(const int* s, uint8_t* out) const {
    int64_t bias = 0;
    for (int part = 0; part < parts_; ++part, out += part_bytes_) {
      if (tables_ == nullptr) {
        order(s, part, *order_, out);
      } else {
        const auto half_byte = [&](int64_t d) { return half_byte_of(s[d], part); };
        bias += tables_->write(half_byte, out) * ((1 << bits_) - 1) << half_byte_bits * part;
      }
    }
    return static_cast<int32_t>(bias);
  }
  // For multiply_rows.
  void prepare_for_rows(const int* s, uint8_t* out) const {
    for (int part = 0; part < row_parts_; ++part, out += row_order_->bytes()) order(s, part, *row_order_, out);
  }
  void pack(const Rows& some, uint8_t* block) const {
    if (tables_ != nullptr) return lookups_->pack(some, bits_, block);
    kernels.active().pack_levels(some, bits_, reinterpret_cast<uint32_t*>(block));
  }
  // One query against rows as they lie, where that can be.
  bool can_take_rows() const { return row_order_ != nullptr; }
  int row_parts() const { return row_parts_; }
  void multiply_rows(const Rows& some, const uint8_t* query, int32_t* const* products) const {
    for (int part = 0; part < row_parts_; ++part, query += row_order_->bytes()) {
      kernels.active().rows->multiply_levels(some, bits_, query, products[part]);
    }
  }
  void scan(const Block& block, const BlockFactors& factors, const ScalarQueryGroup& queries) const {
    if (tables_ != nullptr) {
      return scalar_kernels.active().scan_lookups(block, factors, tables_->groups(), bits_, parts_, queries);
    }
    scalar_kernels.active().scan(block, factors, words_, bits_ > 4, parts_, queries);
  }

 private:
  // A part of s in a byte, or both of its parts in one each.
  void order(const int* s, int part, const LevelOrder& order, uint8_t* out) const {
    std::vector<int8_t> bytes(dim_ + 1);
    for (int64_t d = 0; d < dim_; ++d) {
      bytes[d] = static_cast<int8_t>(row_parts_ == 1 ? s[d]
                                     : part == 0     ? s[d] >> second_part_bits
                                                     : s[d] & ((1 << second_part_bits) - 1));
    }
    order.apply(bytes.data(), out);
  }

  // s as one half byte, or as two from -8 to 8.
  int half_byte_of(int s, int part) const {
    constexpr int half = 1 << (half_byte_bits - 1);
    if (parts_ == 1) return s;
    const int high = (s + half) >> half_byte_bits;
    return part == 1 ? high : s - high * (1 << half_byte_bits);
  }

  int64_t dim_;
  int bits_;
  int64_t plane_bytes_;
  const Lookups* lookups_;
  int parts_, row_parts_;
  int64_t part_bytes_, code_bytes_, rows_;
  int64_t words_ = 0;                                    // of a code, without look-ups
  std::unique_ptr<const LookupTables> tables_;           // with them
  std::unique_ptr<const LevelOrder> order_, row_order_;  // where they are wanted
};

void search(const ScalarMatrix& queries, const ScalarMatrix& codes, const Selection& selection, int64_t dim, int64_t k,
            float* scores, int64_t* ids, int threads) {
  const int64_t query_rows = queries.codes.rows;
  const Products products(queries, codes, selection, dim);
  const Buffer<uint8_t> packed_queries(query_rows * products.query_bytes());
  const Buffer<uint8_t> row_queries(query_rows * products.row_query_bytes());
  const Buffer<ScalarQuery> query_factors(query_rows);
  const Buffer<int32_t> biases(query_rows);
  const Buffer<int> s((dim + 7) / 8 * 8);
  for (int64_t row = 0; row < query_rows; ++row) {
    read_query(queries.codes.data + row * queries.codes.stride, queries.bits, dim, s.at(0));
    *biases.at(row) = products.prepare(s.at(0), packed_queries.at(row * products.query_bytes()));
    if (products.can_take_rows()) products.prepare_for_rows(s.at(0), row_queries.at(row * products.row_query_bytes()));
    *query_factors.at(row) = query_factors_of(queries.factors + row * scalar_factors, queries.bits, dim, s.at(0));
  }

  const Schedule schedule(query_rows, codes.codes, selection, k, threads);
  const int64_t rows = products.rows();
  const Codes selected(codes.codes, codes.factors, scalar_factors, selection, rows, schedule.workers());
  const Buffer<uint8_t> blocks(schedule.workers() * products.block_bytes());
  const Buffer<float> block_factors(schedule.workers() * rows * scalar_factors);
  const int64_t room = row_sums_room(rows);
  const Buffer<int32_t> row_products(schedule.workers() * 2 * room);
  const ScalarKernels& isa = scalar_kernels.active();
  const auto scan = [&](const Batch& batch, const Piece& piece, Candidates* candidates, int64_t worker) {
    const BlockFactors laid_out = {block_factors.at(worker * rows * scalar_factors), rows};
    if (products.can_take_rows() && piece.member_count == 1) {
      const int64_t query = batch.first_query + piece.members[0];
      int32_t* const of_parts[] = {row_products.at(2 * worker * room), row_products.at((2 * worker + 1) * room)};
      for (int64_t first = piece.first; first < piece.last; first += rows) {
        const Block block = {
            nullptr, std::min(rows, piece.last - first), static_cast<uint32_t>(first), nullptr, 0, nullptr, 0};
        const Codes::Some some = selected.at(first, block.count, worker);
        products.multiply_rows(some.rows, row_queries.at(query * products.row_query_bytes()), of_parts);
        isa.lay_out(some.factors, block.count, dim, laid_out);
        isa.offer_rows(block, laid_out, of_parts, products.row_parts(), *query_factors.at(query),
                       candidates[piece.members[0]]);
      }
      return;
    }
    const ScalarQueryGroup group = {packed_queries.at(batch.first_query * products.query_bytes()),
                                    products.part_bytes(),
                                    biases.at(batch.first_query),
                                    query_factors.at(batch.first_query),
                                    piece.members,
                                    piece.member_count,
                                    candidates};
    scan_blocks(
        selected, piece, rows, worker, blocks.at(worker * products.block_bytes()),
        [&](const Rows& some, uint8_t* block) { products.pack(some, block); },
        [&](const Block& block, const float* factors) {
          isa.lay_out(factors, block.count, dim, laid_out);
          products.scan(block, laid_out, group);
        });
  };
  const float none = -std::numeric_limits<float>::infinity();
  schedule.run(key_of_score(none), scan, [&](int64_t query, const uint64_t* entries, int64_t count) {
    for (int64_t rank = 0; rank < k; ++rank) {
      const bool found = rank < count;
      scores[query * k + rank] = found ? score_of_key(key_of(entries[rank])) : none;
      ids[query * k + rank] = found ? selected.id(entries[rank]) : -1;
    }
    return true;
  });
}

}  // namespace

void scalar_topk(const ScalarMatrix& queries, const ScalarMatrix& codes, const Selection& selection, int64_t dim,
                 int64_t k, float* scores, int64_t* ids, int threads) {
  for (int64_t first = 0; first < queries.codes.rows; first += most_queries) {
    ScalarMatrix some = queries;
    some.codes.data += first * queries.codes.stride;
    some.codes.rows = std::min(most_queries, queries.codes.rows - first);
    some.factors += first * scalar_factors;
    Selection their_selection = selection;
    if (selection.has_ranges()) their_selection.ranges += first * selection.range_count * 2;
    search(some, codes, their_selection, dim, k, scores + first * k, ids + first * k, threads);
  }
}

}  // namespace fastembed::search
