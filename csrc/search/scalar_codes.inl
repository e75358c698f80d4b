// Inner products of scalar codes, written once over a vector type `V` of 32-bit lanes (dwords_*.inl), a code to a lane.
// Each instruction-set file includes this in an anonymous namespace of its level, after them. Compiled
// without contraction (setup.py), so that the score has the same bits at every level.
//
// With a code lower + step c, its total = dim lower + step sum(c), and a query lower' + step' s, the estimate is
//
//     <code, query> = step' (step <c, s> + lower sum(s)) + lower' total
//
// where <c, s> is an exact integer. To it the score adds the `extra` of the code and of the query. The products of
// bytes want unsigned c and signed s. Sums of 32 bits hold them: |<c, s>| <= 128 dim (2^bits - 1) < 2^31, the caller's
// promise.

// The score of `lanes` codes of a block, from `row` on, and its offer to the candidates of a query.
template <class V>
struct ScalarScores {
  using Floats = typename V::Floats;
  static constexpr int64_t lanes = V::lanes;

  ScalarScores(const BlockFactors& factors, int64_t row)
      : step(V::load(factors.data + row)),
        lower(V::load(factors.data + factors.stride + row)),
        total(V::load(factors.data + 2 * factors.stride + row)),
        extra(V::load(factors.data + 3 * factors.stride + row)) {}

  Floats of(Floats product, const ScalarQuery& query) const {
    Floats score = V::multiply(step, product);
    score = V::multiply(V::add(score, V::multiply(lower, V::all(query.sum))), V::all(query.step));
    score = V::add(V::add(score, V::multiply(total, V::all(query.lower))), extra);
    return V::add(score, V::all(query.extra));
  }

  static void offer(const Block& block, int64_t row, Candidates& candidates, Floats scores) {
    offer_scores<V>(scores, block.count - row, block.first_id + static_cast<uint32_t>(row), candidates);
  }

  Floats step, lower, total, extra;
};

// Products by multiplication of bytes.
template <class V>
struct ScalarCodeKernels {
  using Scores = ScalarScores<V>;
  using Word = typename V::Word;
  using Floats = typename V::Floats;
  static constexpr int64_t lanes = V::lanes;

  template <int parts>
  static Floats product(const Word* dots) {
    if constexpr (parts == 1) return V::to_floats(dots[0]);
    return V::add(V::multiply(V::to_floats(dots[0]), V::all(128.0f)), V::to_floats(dots[1]));
  }

  // `n` queries of `parts` parts each, `m` groups of codes.
  template <int m, int n, int parts, bool wide>
  static void scan_group(const Block& block, const BlockFactors& factors, int64_t words,
                         const ScalarQueryGroup& queries, int64_t first) {
    using Products = ByteProducts<V>;
    const uint32_t* const members = queries.members + first;
    constexpr int sums = n * parts;
    const uint8_t* query[sums];
    for (int j = 0; j < sums; ++j) {
      query[j] = queries.data + (members[j / parts] * parts + j % parts) * queries.bytes;
    }
    const int64_t group_words = wide ? 2 * words + 1 : words;
    Fetch fetch(block, first, n, queries.count, (block.count + lanes - 1) / lanes);
    Products::template for_rows<m>(block.count, fetch, [&](int64_t row, auto groups) __attribute__((always_inline)) {
      constexpr int some = decltype(groups)::value;
      Word dots[some][sums];
      for (int i = 0; i < some; ++i) {
        for (int j = 0; j < sums; ++j) dots[i][j] = V::zero();
      }
      Products::template add<some, sums, wide>(static_cast<const uint32_t*>(block.data) + row * group_words,
                                               group_words, words, query, dots);
#pragma GCC unroll 4
      for (int i = 0; i < some; ++i) {
        const Scores scores(factors, row + i * lanes);
#pragma GCC unroll 8
        for (int j = 0; j < n; ++j) {
          Scores::offer(block, row + i * lanes, queries.candidates[members[j]],
                        scores.of(product<parts>(dots[i] + j * parts), queries.queries[members[j]]));
        }
      }
    });
  }

  template <int parts, bool wide>
  static void scan_all(const Block& block, const BlockFactors& factors, int64_t words,
                       const ScalarQueryGroup& queries) {
    ByteProducts<V>::template for_groups<parts>(queries.count, [&](int64_t first, auto n, auto m) {
      scan_group<decltype(m)::value, decltype(n)::value, parts, wide>(block, factors, words, queries, first);
    });
  }

  // [count, scalar factors] to what the scores take.
  static void lay_out(const float* factors, int64_t count, int64_t dim, const BlockFactors& out) {
    for (int64_t i = 0; i < count; i += lanes) {
      float last[4 * lanes] = {};
      const float* from = factors + 4 * i;
      if (count - i < lanes) {
        __builtin_memcpy(last, from, static_cast<unsigned long>(count - i) * 4 * sizeof(float));
        from = last;
      }
      Floats parted[4];
      V::load_four(from, parted);
      const Floats lower = parted[0], step = parted[1];
      V::store(out.data + i, step);
      V::store(out.data + out.stride + i, lower);
      V::store(out.data + 2 * out.stride + i,
               V::add(V::multiply(lower, V::all(static_cast<float>(dim))), V::multiply(step, parted[2])));
      V::store(out.data + 3 * out.stride + i, parted[3]);
    }
  }

  template <int parts>
  static void offer_rows_of(const Block& block, const BlockFactors& factors, const int32_t* const* products,
                            const ScalarQuery& query, Candidates& candidates) {
    for (int64_t row = 0; row < block.count; row += lanes) {
      Word dots[parts];
      for (int part = 0; part < parts; ++part) {
        dots[part] = V::load(reinterpret_cast<const uint32_t*>(products[part]) + row);
      }
      Scores::offer(block, row, candidates, Scores(factors, row).of(product<parts>(dots), query));
    }
  }

  static void offer_rows(const Block& block, const BlockFactors& factors, const int32_t* const* products, int parts,
                         const ScalarQuery& query, Candidates& candidates) {
    return parts == 1 ? offer_rows_of<1>(block, factors, products, query, candidates)
                      : offer_rows_of<2>(block, factors, products, query, candidates);
  }

  static void scan(const Block& block, const BlockFactors& factors, int64_t words, bool wide, int parts,
                   const ScalarQueryGroup& queries) {
    if (parts == 1) {
      return wide ? scan_all<1, true>(block, factors, words, queries)
                  : scan_all<1, false>(block, factors, words, queries);
    }
    return wide ? scan_all<2, true>(block, factors, words, queries)
                : scan_all<2, false>(block, factors, words, queries);
  }
};
