// Scores of scalar codes from products by look-up. Included in the anonymous namespace of the level, after
// lookups_*.inl and scalar_codes.inl.

template <class V>
struct ScalarLookupKernels {
  using Word = typename V::Word;
  using Floats = typename V::Floats;
  using Scores = ScalarScores<V>;
  using Products = LookupKernels<V>;
  static constexpr int64_t lanes = V::lanes;
  static constexpr int64_t codes = Products::codes;

  template <int n>
  static void scan_group(const Block& block, const BlockFactors& factors, int64_t groups, int planes, int parts,
                         const ScalarQueryGroup& queries, int64_t first) {
    const uint32_t* const members = queries.members + first;
    // Of as many groups as fit 16 bits, and of all.
    typename Products::Sums some[most_lookup_rows / codes * n];
    alignas(64) uint32_t sums[n][most_lookup_rows];
    const int64_t most = UINT16_MAX / (8 * V::index_bits * ((1 << planes) - 1)) / lookup_chunk * lookup_chunk;
    Fetch fetch(block, first, n, queries.count, (block.count + codes - 1) / codes);
    for (int part = 0; part < parts; ++part) {
      const uint8_t* tables[n];
      for (int j = 0; j < n; ++j) tables[j] = queries.data + (members[j] * parts + part) * queries.bytes;
      for (int64_t g = 0; g < groups; g += most) {
        const int64_t end = groups - g < most ? groups : g + most;
        Products::template sum<n, lookups_of_halves>(block, groups, planes, tables, g, end, fetch, some);
        const bool is_first = part == 0 && g == 0, is_last = part + 1 == parts && end == groups;
        for (int j = 0; j < n; ++j) {
          const Word bias = V::splat(-queries.biases[members[j]]);
          const ScalarQuery query = queries.queries[members[j]];
          for (int64_t row = 0; row < block.count; row += codes) {
            uint32_t* const to = sums[j] + row;
            Word words[4];
            some[row / codes * n + j].widen(words);
            for (int i = 0; i < 4; ++i) {
              words[i] =
                  V::add(is_first ? bias : V::load(to + i * lanes), V::shift_left(words[i], half_byte_bits * part));
            }
            if (is_last) {
              offer(block, factors, row, words, query, queries.candidates[members[j]]);
            } else {
              for (int i = 0; i < 4; ++i) V::store(to + i * lanes, words[i]);
            }
          }
        }
      }
    }
  }

  static inline __attribute__((always_inline)) void offer(const Block& block, const BlockFactors& factors, int64_t row,
                                                          const Word (&products)[4], const ScalarQuery& query,
                                                          Candidates& candidates) {
    const float limit = score_of_key(candidates.limit);
    Floats scores[4];
    uint32_t above = 0;
    for (int i = 0; i < 4; ++i) {
      scores[i] = Scores(factors, row + i * lanes).of(V::to_floats(products[i]), query);
      above |= V::above(scores[i], limit);
    }
    if (__builtin_expect(above == 0, 1)) return;
    for (int i = 0; i < 4 && row + i * lanes < block.count; ++i) {
      Scores::offer(block, row + i * lanes, candidates, scores[i]);
    }
  }

  static void scan(const Block& block, const BlockFactors& factors, int64_t groups, int planes, int parts,
                   const ScalarQueryGroup& queries) {
    Products::for_groups(queries.count, [&](int64_t first, auto n) {
      scan_group<decltype(n)::value>(block, factors, groups, planes, parts, queries, first);
    });
  }
};
