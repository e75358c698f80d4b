// Inner products of scalar codes, written once over a vector type `V` of 32-bit lanes, a code to a lane. Each
// instruction-set file includes this in an anonymous namespace of its level, after scalar_codes_kernels.hpp and
// score.hpp. Compiled without contraction (setup.py), so that the score has the same bits at every level.
//
// With a code lower + step c, its total = dim lower + step sum(c), and a query lower' + step' s, the estimate is
//
//     <code, query> = step' (step <c, s> + lower sum(s)) + lower' total
//
// where <c, s> is an exact integer. To it the score adds the `extra` of the code and of the query. The products of
// bytes want unsigned c and signed s. Sums of 32 bits hold them: |<c, s>| <= 128 dim (2^bits - 1) < 2^31, the caller's
// promise.

template <class V>
struct ScalarCodeKernels {
  using Word = typename V::Word;
  using Floats = typename V::Floats;
  static constexpr int64_t lanes = V::lanes;
  // Sums that fit in registers.
  static constexpr int64_t group = 8;

  template <int parts>
  static Floats product(const Word* dots) {
    if constexpr (parts == 1) return V::to_floats(dots[0]);
    return V::add(V::multiply(V::to_floats(dots[0]), V::all(128.0f)), V::to_floats(dots[1]));
  }

  // `n` queries of `parts` parts each.
  template <int n, int parts, bool wide>
  static void scan_group(const Block& block, const BlockFactors& factors, int64_t words,
                         const ScalarQueryGroup& queries, int64_t first) {
    const uint32_t* const members = queries.members + first;
    constexpr int sums = n * parts;
    const int8_t* query[sums];
    for (int j = 0; j < sums; ++j) {
      query[j] = queries.data + (members[j / parts] * parts + j % parts) * queries.bytes;
    }
    const uint32_t* code = static_cast<const uint32_t*>(block.data);
    Fetch fetch(block, first, n, queries.count, (block.count + lanes - 1) / lanes);
    for (int64_t row = 0; row < block.count; row += lanes) {
      fetch.step();
      Word dots[sums];
      for (int j = 0; j < sums; ++j) dots[j] = V::zero();
      for (int64_t w = 0; w < words; ++w, code += (wide ? 2 : 1) * lanes) {
        const Word both = V::load(code);
        const Word low = wide ? both : V::low_halves(both);
        const Word high = wide ? V::load(code + lanes) : V::high_halves(both);
#pragma GCC unroll 8
        for (int j = 0; j < sums; ++j) {
          const Word q0 = V::four_bytes(query[j] + w * 8), q1 = V::four_bytes(query[j] + w * 8 + 4);
          dots[j] = wide ? V::add_dot_wide(V::add_dot_wide(dots[j], low, q0), high, q1)
                         : V::add_dot(V::add_dot(dots[j], low, q0), high, q1);
        }
      }
      if (wide) code += lanes;  // sums that searches by levels want
      const float* const of_codes = factors.data + row;
      const Floats step = V::load(of_codes), lower = V::load(of_codes + factors.stride);
      const Floats total = V::load(of_codes + 2 * factors.stride), extra = V::load(of_codes + 3 * factors.stride);
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) {
        const ScalarQuery& q = queries.queries[members[j]];
        Floats score = V::multiply(step, product<parts>(dots + j * parts));
        score = V::multiply(V::add(score, V::multiply(lower, V::all(q.sum))), V::all(q.step));
        score = V::add(V::add(score, V::multiply(total, V::all(q.lower))), extra);
        offer(block, row, queries.candidates[members[j]], V::add(score, V::all(q.extra)));
      }
    }
  }

  static void offer(const Block& block, int64_t row, Candidates& candidates, Floats scores) {
    uint32_t above = V::above(scores, score_of_key(candidates.limit));
    if (__builtin_expect(above == 0, 1)) return;
    if (block.count - row < lanes) above &= (1u << (block.count - row)) - 1;
    float score[lanes];
    V::store(score, scores);
    for (; above != 0; above &= above - 1) {
      const int lane = __builtin_ctz(above);
      add_candidate(candidates, key_of_score(score[lane]), block.first_id + static_cast<uint32_t>(row + lane));
    }
  }

  // Queries in groups that share the loads of a code, what is left over one by one.
  template <int parts, bool wide>
  static void scan_all(const Block& block, const BlockFactors& factors, int64_t words,
                       const ScalarQueryGroup& queries) {
    constexpr int n = group / parts;
    int64_t first = 0;
    for (; first + n <= queries.count; first += n) {
      scan_group<n, parts, wide>(block, factors, words, queries, first);
    }
    for (; first < queries.count; ++first) scan_group<1, parts, wide>(block, factors, words, queries, first);
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
