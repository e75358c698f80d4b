// SDC with 3 or 4 bits: dot products of bytes, written once over a vector type `V` of 32-bit lanes, under the same
// rules as bit_kernels.hpp.
//
// Codes c are unsigned, the queries' levels v' signed bytes (|v'| <= 15), as the byte dot products of every instruction
// set want them; with m = 2^bits - 1 the dot product of the levels is  sum (2c - m) v' = 2 sum c v' - m sum v'.
//

template <class V>
struct LevelKernels {
  using Sums = typename V::Sums;
  static constexpr int64_t lanes = V::lanes;
  static constexpr int64_t group = V::query_group;

  static void pack_levels(const Rows& codes, int bits, int64_t dim, uint8_t* block) {
    const int64_t plane_bytes = codes.bytes / bits;
    const int64_t padded_dim = (dim + 3) / 4 * 4;
    for (int64_t row = 0; row < codes.count; row += lanes, block += padded_dim * lanes) {
      __builtin_memset(block, 0, static_cast<unsigned long>(padded_dim * lanes));
      for (int64_t lane = 0; lane < lanes && row + lane < codes.count; ++lane) {
        const uint8_t* const source = codes.data + (row + lane) * codes.stride;
        for (int64_t d = 0; d < dim; ++d) {
          int c = 0;
          for (int plane = 0; plane < bits; ++plane) {
            c = 2 * c + (source[plane * plane_bytes + d / 8] >> (7 - d % 8) & 1);
          }
          block[(d / 4 * lanes + lane) * 4 + d % 4] = static_cast<uint8_t>(c);
        }
      }
    }
  }

  template <int n>
  static void scan_group(const Block& block, int bits, int64_t dim, const QueryGroup& queries, int64_t first) {
    const int64_t padded_dim = (dim + 3) / 4 * 4;
    const int8_t* const query = static_cast<const int8_t*>(queries.data) + first * padded_dim;
    int32_t offset[n];
    for (int j = 0; j < n; ++j) {
      int32_t sum = 0;
      for (int64_t d = 0; d < dim; ++d) sum += query[j * padded_dim + d];
      offset[j] = ((1 << bits) - 1) * sum;
    }
    const uint8_t* code = static_cast<const uint8_t*>(block.data);
    for (int64_t row = 0; row < block.count; row += lanes) {
      Sums sums[n];
      for (int j = 0; j < n; ++j) sums[j] = V::zero();
      for (int64_t d = 0; d < padded_dim; d += 4, code += 4 * lanes) {
        const auto bytes = V::load(code);
#pragma GCC unroll 8
        for (int j = 0; j < n; ++j) sums[j] = V::add_dot(sums[j], bytes, query + j * padded_dim + d);
      }
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) {
        Candidates& candidates = queries.candidates[first + j];
        float score[lanes];
        uint32_t above = V::scores_above(sums[j], offset[j], block.inverse_norms + row, block.count - row,
                                         queries.inverse_norms[first + j], score_of_key(candidates.limit), score);
        for (; above != 0; above &= above - 1) {
          const int lane = __builtin_ctz(above);
          const uint32_t key = key_of_score(score[lane]);
          if (key >= candidates.limit) continue;
          add_candidate(candidates, key, block.first_id + static_cast<uint32_t>(row + lane));
        }
      }
    }
  }

  static void scan_levels(const Block& block, int bits, int64_t dim, const QueryGroup& queries) {
    int64_t first = 0;
    for (; first + group <= queries.count; first += group) scan_group<group>(block, bits, dim, queries, first);
    for (; first < queries.count; ++first) scan_group<1>(block, bits, dim, queries, first);
  }
};
