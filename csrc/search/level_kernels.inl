// SDC with 3 to 8 bits: dot products of bytes, written once over a vector type `V` of 32-bit lanes (dwords_*.inl).
// Each instruction-set file includes this in an anonymous namespace of its level, after them.
//
// The byte dot products of every instruction set want unsigned codes c and signed queries. With m = 2^bits - 1 levels
// are v = 2 c - m. Up to 4 bits, a query is its levels v', and  v . v' = 2 c . v' - m sum(v').  With more, levels may
// not fit a byte; a query is s = c' - 2^(bits - 1), so that v' = 2 s + 1, and  v . v' = 2 (2 c . s + sum(c)) - 2 m
// sum(s) - m dim. What does not depend on the code is a constant of the query. All in 32 bits, which wrap around
// meanwhile.

template <class V>
struct LevelKernels {
  using Word = typename V::Word;
  static constexpr int64_t lanes = V::lanes;

  template <int m, int n, bool wide>
  static void scan_group(const Block& block, int64_t words, const QueryGroup& queries, int64_t first) {
    using Products = ByteProducts<V>;
    const uint32_t* const members = queries.members + first;
    const uint8_t* query[n];
    int32_t start[n];  // sums begin here, so that those of codes that may be wanted are 0 or more
    for (int j = 0; j < n; ++j) {
      query[j] = static_cast<const uint8_t*>(queries.data) + members[j] * words * 8;
      const int64_t least = least_dot(score_of_key(queries.candidates[members[j]].limit),
                                      queries.inverse_norms[members[j]], block.largest_inverse_norm);
      // 2 sum + constant > least  where  sum - (least - constant) / 2, rounded down, is more than 0.
      start[j] = static_cast<int32_t>(-1 - ((least - queries.constants[members[j]]) >> 1));
    }
    const int64_t group_words = wide ? 2 * words + 1 : words;
    Fetch fetch(block, first, n, queries.count, (block.count + lanes - 1) / lanes);
    Products::template for_rows<m>(block.count, fetch, [&](int64_t row, auto groups) __attribute__((always_inline)) {
      constexpr int some = decltype(groups)::value;
      const uint32_t* const code = static_cast<const uint32_t*>(block.data) + row * group_words;
      Word dots[some][n];
#pragma GCC unroll 4
      for (int i = 0; i < some; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < n; ++j) dots[i][j] = wide ? V::zero() : V::splat(start[j]);
      }
      Products::template add<some, n, wide>(code, group_words, words, query, dots);
      if constexpr (wide) {
#pragma GCC unroll 4
        for (int i = 0; i < some; ++i) {
          const Word sums = V::load(code + (i * group_words + 2 * words) * lanes);
#pragma GCC unroll 8
          for (int j = 0; j < n; ++j) {
            dots[i][j] = V::add(V::add(V::add(dots[i][j], dots[i][j]), sums), V::splat(start[j]));
          }
        }
      }
      Word signs = dots[0][0];
#pragma GCC unroll 4
      for (int i = 0; i < some; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < n; ++j) signs = V::intersect(signs, dots[i][j]);
      }
      if (__builtin_expect(!V::any_positive(signs), 1)) return;
      Word found[some * n];  // in memory, as the sums themselves must not be
#pragma GCC unroll 4
      for (int i = 0; i < some; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < n; ++j) found[i * n + j] = dots[i][j];
      }
      for (int i = 0; i < some; ++i) offer<n>(block, row + i * lanes, queries, members, found + i * n, start);
    });
  }

  // Sums of a group of codes with n queries, of which some may be wanted.
  template <int n>
  static __attribute__((noinline)) void offer(const Block& block, int64_t row, const QueryGroup& queries,
                                              const uint32_t* members, const Word* sums, const int32_t* start) {
    for (int j = 0; j < n; ++j) {
      if (!V::any_positive(sums[j])) continue;
      const uint32_t query = members[j];
      // Back to the dot product of levels.
      const Word sum = V::add(sums[j], V::splat(-start[j]));
      offer_dots<V>(V::add(V::add(sum, sum), V::splat(queries.constants[query])), block.count - row,
                    block.first_id + static_cast<uint32_t>(row), block.inverse_norms + row,
                    queries.inverse_norms[query], queries.candidates[query]);
    }
  }

  template <bool wide>
  static void scan(const Block& block, int64_t words, const QueryGroup& queries) {
    ByteProducts<V>::template for_groups<1>(queries.count, [&](int64_t first, auto n, auto m) {
      scan_group<decltype(m)::value, decltype(n)::value, wide>(block, words, queries, first);
    });
  }

  static void scan_levels(const Block& block, int64_t words, int bits, const QueryGroup& queries) {
    return bits <= 4 ? scan<false>(block, words, queries) : scan<true>(block, words, queries);
  }
};
