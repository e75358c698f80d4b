// The search kernels of one instruction set. Plain data: files of every instruction set include it.
//
// Codes arrive as the user holds them, one row per code. For more than a query or two they are rearranged, a block that
// fits the first-level cache at a time, so that a register holds the same word of several codes ("lanes"): then no
// kernel ever sums across a register, and the rearranging is paid once for all the queries of a batch.
#pragma once

#include <cstdint>

#include "search/candidates.hpp"

namespace fastembed::search {

struct Rows {
  const uint8_t* data;
  int64_t stride;  // bytes from one row to the next
  int64_t count;
  int64_t bytes;  // of one row
};

// 64-bit words of a bit plane; its last word is padded with zeros.
constexpr int64_t words_of(int64_t bytes) { return (bytes + 7) / 8; }

// Codes by levels are packed in words of 8 dimensions, 4 words for 32 dimensions. With up to 4 bits that is a 32-bit
// word, else two, and the sum of the code stands behind the last one.
constexpr int64_t level_words(int64_t plane_bytes) { return (plane_bytes + 3) / 4 * 4; }
constexpr int64_t level_dwords(int64_t words, int bits) { return bits <= 4 ? words : 2 * words + 1; }

struct Block {
  const void* data;            // as `pack_*` of the same table left it
  int64_t count;               // codes in it
  uint32_t first_id;           // id of its first code
  const float* inverse_norms;  // of its codes; SDC only
  float largest_inverse_norm;  // SDC only
  const uint8_t* next;         // what is packed next, to be fetched from memory while this block is scanned
  int64_t next_bytes;
};

// Queries that meet a block: numbers in the packed queries at `data`, in the candidates and in what else there is of
// each query.
struct QueryGroup {
  const void* data;
  const uint32_t* members;
  int64_t count;  // of members
  Candidates* candidates;
  const float* inverse_norms;  // SDC only
  const int32_t* constants;    // SDC by levels only
};

// One query against rows as they lie, for which packing would not pay: sums of products, with the room of
// row_sums_room, and the offer of codes by these.
struct RowKernels {
  // 1 or 2 bits; `query` is a row. The dot product of levels is  largest + 2 sum,  of the largest one there is.
  void (*multiply_planes)(const Rows& codes, int bits, const uint8_t* query, int32_t* sums);
  // Products of the unsigned integers of codes with signed bytes. Byte `index` of the query, of row_level_bytes,
  // belongs to dimension dim_of_level(index, bits).
  void (*multiply_levels)(const Rows& codes, int bits, const uint8_t* query, int32_t* sums);
  int64_t (*dim_of_level)(int64_t index, int bits);
  // SDC: dot products are  constant + 2 sum.
  void (*offer)(const int32_t* sums, int64_t count, uint32_t first_id, const float* inverse_norms,
                float query_inverse_norm, int32_t constant, Candidates& candidates);
};

// Sums are written and read 16 at a time.
constexpr int64_t row_sums_room(int64_t rows) { return (rows + 15) / 16 * 16; }

// Bytes for 8 dimensions stand for each byte of a plane, for a whole number of 64 plane bytes.
constexpr int64_t row_level_bytes(int64_t plane_bytes) { return (plane_bytes + 63) / 64 * 64 * 8; }

// Products by table: for every few bits of a plane the table of a query has the sum of a number for each bit that is
// set, less the least such sum. Numbers are -8 to 8 for scalar codes, -3 to 3 for levels. Codes become
// [rows / codes, planes, groups, codes] indices of a byte each, groups being a multiple of lookup_chunk. Index g of a
// plane is its bits g * index_bits and following (bit p: bit p % 8 of byte p / 8, counted from the least significant).
struct Lookups {
  int64_t codes;       // side by side
  int64_t index_bits;  // of a code looked up at once
  void (*pack)(const Rows& codes, int planes, uint8_t* block);
  // SDC with 2 bits, with tables of levels; dot products are  constant + 2 sum.
  void (*scan_two_bits)(const Block& block, int64_t groups, int64_t query_bytes, const QueryGroup& queries);
};

constexpr int64_t lookup_chunk = 8;
// Look-ups summed in bytes, of which groups are a multiple: 4 tables of 6 numbers up to 8, 8 of numbers up to 3.
constexpr int lookups_of_halves = 4, lookups_of_levels = 8;
// Codes of a block for look-ups.
constexpr int64_t most_lookup_rows = 512;

struct Kernels {
  // Codes side by side in a packed block: room for a whole number of such groups is needed.
  int64_t bit_lanes;
  int64_t level_lanes;

  // Hamming distance of one query to rows as they lie. `query` is a row.
  void (*scan_rows)(const Rows& codes, uint32_t first_id, const uint8_t* query, Candidates& candidates);

  // Hamming distance, packed: words_of(bytes) words per code.
  void (*pack_hamming)(const Rows& codes, uint64_t* block);
  void (*scan_hamming)(const Block& block, int64_t words, const QueryGroup& queries);

  // SDC with 1 or 2 bits: integer dot products from popcounts, bits * words_of(bytes / bits) words per code.
  void (*pack_planes)(const Rows& codes, int bits, uint64_t* block);
  void (*scan_planes)(const Block& block, int64_t words, int bits, int64_t dim, const QueryGroup& queries);

  // SDC with 3 to 8 bits: dot products of bytes, level_words(bytes / bits) packed words per code. Level `index` of a
  // packed query belongs to dimension dim_of_level(index, whether there are more than 4 bits); what lies beyond the
  // last one is 0 in codes.
  void (*pack_levels)(const Rows& codes, int bits, uint32_t* block);
  int64_t (*dim_of_level)(int64_t index, bool wide);
  void (*scan_levels)(const Block& block, int64_t words, int bits, const QueryGroup& queries);

  const Lookups* lookups;  // or null
  const RowKernels* rows;  // or null
};

namespace {

// Fetches `next` of a block into the second-level cache, a little with every group of codes that a group of queries
// meets: all at once it would hold up the kernel.
class Fetch {
 public:
  // The share of queries [first, first + count) of a group, over `steps` steps.
  Fetch(const Block& block, int64_t first, int64_t count, int64_t queries, int64_t steps)
      : at_(block.next + block.next_bytes * first / queries),
        end_(block.next + block.next_bytes * (first + count) / queries),
        step_((end_ - at_) / steps + 1) {}
  void step() {
    const uint8_t* const stop = end_ - at_ < step_ ? end_ : at_ + step_;
    for (; at_ < stop; at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const uint8_t *at_, *end_;
  int64_t step_;
};

}  // namespace

namespace generic {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512vnni {
extern const Kernels kernels;
}
#endif

}  // namespace fastembed::search
