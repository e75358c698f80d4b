// The search over scalar codes: how queries, codes and what stands beside them are laid out for the kernels.

#include "search/scalar_codes.hpp"

#include <algorithm>
#include <limits>

#include "search/blocks.hpp"
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

// The integers of a query in the order of dimensions of the kernels, in one or two bytes each; and its other factors,
// moved from c to s = c - 2^(bits - 1).
ScalarQuery scalar_query(const uint8_t* code, const float* factors, int bits, int64_t dim, int64_t bytes,
                         int8_t* parts) {
  const int64_t plane_bytes = (dim + 7) / 8;
  const int half = 1 << (bits - 1);
  int64_t sum = 0;
  for (int64_t index = 0; index < bytes; ++index) {
    const int64_t d = dim_of_level(index);
    int s = 0;
    if (d < dim) {
      for (int plane = 0; plane < bits; ++plane) s = 2 * s + (code[plane * plane_bytes + d / 8] >> (7 - d % 8) & 1);
      s -= half;
    }
    sum += s;
    if (bits <= part_bits) {
      parts[index] = static_cast<int8_t>(s);
    } else {
      const int low = s & ((1 << second_part_bits) - 1);
      parts[index] = static_cast<int8_t>((s - low) >> second_part_bits);
      parts[bytes + index] = static_cast<int8_t>(low);
    }
  }
  const float lower = factors[0], step = factors[1];
  // A zero added to -0 leaves 0, so that no score is -0, which would rank below 0.
  return {step, lower + step * static_cast<float>(half), static_cast<float>(sum), factors[3] + 0.0f};
}

// [rows, scalar_factors] to what the kernels take.
void lay_out(const float* factors, int64_t rows, int64_t lanes, int64_t dim, int64_t stride, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const float lower = factors[i * scalar_factors], step = factors[i * scalar_factors + 1];
    out[i] = step;
    out[stride + i] = lower;
    out[2 * stride + i] = lower * static_cast<float>(dim) + step * factors[i * scalar_factors + 2];
    out[3 * stride + i] = factors[i * scalar_factors + 3];
  }
  for (int64_t i = rows; i % lanes != 0; ++i) {
    for (int64_t j = 0; j < scalar_factors; ++j) out[j * stride + i] = 0;
  }
}

}  // namespace

void scalar_topk(const ScalarMatrix& queries, const ScalarMatrix& codes, const Selection& selection, int64_t dim,
                 int64_t k, float* scores, int64_t* ids, int threads) {
  const int64_t query_rows = queries.codes.rows;
  if (query_rows == 0) return;
  const Kernels& packing = kernels.active();
  const ScalarKernels& isa = scalar_kernels.active();
  const int64_t words = level_words((dim + 7) / 8);
  const bool wide = codes.bits > 4;
  const int parts = queries.bits <= part_bits ? 1 : 2;

  const int64_t query_bytes = words * 8;
  const Buffer<int8_t> packed_queries(query_rows * parts * query_bytes);
  const Buffer<ScalarQuery> query_factors(query_rows);
  for (int64_t row = 0; row < query_rows; ++row) {
    *query_factors.at(row) =
        scalar_query(queries.codes.data + row * queries.codes.stride, queries.factors + row * scalar_factors,
                     queries.bits, dim, query_bytes, packed_queries.at(row * parts * query_bytes));
  }

  const Schedule schedule(query_rows, codes.codes, selection, k, threads);
  const int64_t dwords = level_dwords(words, codes.bits);
  const int64_t rows = block_rows(dwords * static_cast<int64_t>(sizeof(uint32_t)), packing.level_lanes);
  const Codes selected(codes.codes, codes.factors, scalar_factors, selection, rows, schedule.workers());
  const Buffer<uint32_t> blocks(schedule.workers() * rows * dwords);
  const Buffer<float> block_factors(schedule.workers() * rows * scalar_factors);
  const auto scan = [&](const Batch& batch, const Piece& piece, Candidates* candidates, int64_t worker) {
    const ScalarQueryGroup group = {packed_queries.at(batch.first_query * parts * query_bytes),
                                    query_bytes,
                                    query_factors.at(batch.first_query),
                                    piece.members,
                                    piece.member_count,
                                    candidates};
    float* const laid_out = block_factors.at(worker * rows * scalar_factors);
    scan_blocks(
        selected, piece, rows, worker, blocks.at(worker * rows * dwords),
        [&](const Rows& some, uint32_t* block) { packing.pack_levels(some, codes.bits, block); },
        [&](const Block& block, const float* factors) {
          lay_out(factors, block.count, packing.level_lanes, dim, rows, laid_out);
          isa.scan(block, {laid_out, rows}, words, wide, parts, group);
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

}  // namespace fastembed::search
