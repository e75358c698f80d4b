// Products of packed bytes, written once over a vector type `V` of 32-bit lanes (dwords_*.inl), a code to a lane. Each
// instruction-set file includes this in an anonymous namespace of its level.

template <class V>
struct ByteProducts {
  using Word = typename V::Word;
  static constexpr int64_t lanes = V::lanes;
  // Sums of a group of codes that fit in registers.
  static constexpr int sums = 8;

  // Adds to sums[i][j] the products of codes of group i, `group_words` after one another, with query j. Packed words
  // hold two codes to a byte, or if `wide` one.
  template <int m, int n, bool wide>
  static inline __attribute__((always_inline)) void add(const uint32_t* code, int64_t group_words, int64_t words,
                                                        const uint8_t* const (&query)[n], Word (&sums)[m][n]) {
    Word to[m][n];  // in registers, wherever `sums` are
#pragma GCC unroll 4
    for (int i = 0; i < m; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) to[i][j] = sums[i][j];
    }
    for (int64_t w = 0; w < words; ++w, code += (wide ? 2 : 1) * lanes) {
      Word low[m], high[m];
#pragma GCC unroll 4
      for (int i = 0; i < m; ++i) {
        const uint32_t* const at = code + i * group_words * lanes;
        const Word both = V::load(at);
        low[i] = wide ? both : V::low_halves(both);
        high[i] = wide ? V::load(at + lanes) : V::high_halves(both);
      }
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) {
        const Word q0 = V::four_bytes(query[j] + w * 8), q1 = V::four_bytes(query[j] + w * 8 + 4);
#pragma GCC unroll 4
        for (int i = 0; i < m; ++i) {
          to[i][j] = wide ? V::add_dot_wide(V::add_dot_wide(to[i][j], low[i], q0), high[i], q1)
                          : V::add_dot(V::add_dot(to[i][j], low[i], q0), high[i], q1);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < m; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) sums[i][j] = to[i][j];
    }
  }

  // Calls scan(first, n, m): a block meets queries [first, first + n), of `parts` sums each, m groups of codes at a
  // time. The more meet, the fewer loads.
  template <int parts, class Scan>
  static void for_groups(int64_t queries, const Scan& scan) {
    int64_t first = 0;
    const auto take = [&](auto n) {
      for (; first + n <= queries; first += n) scan(first, n, Constant<V::row_groups(n * parts)>{});
    };
    take(Constant<sums / parts>{});
    if constexpr (parts == 1) take(Constant<4>{});
    take(Constant<2>{});
    take(Constant<1>{});
  }

  // Calls scan(row, m) for all groups of codes of a block, most of them m at a time.
  template <int m, class Scan>
  static inline __attribute__((always_inline)) void for_rows(int64_t count, Fetch& fetch, const Scan& scan) {
    int64_t row = 0;
    for (; row + m * lanes <= count; row += m * lanes) {
      for (int i = 0; i < m; ++i) fetch.step();
      scan(row, Constant<m>{});
    }
    for (; row < count; row += lanes) {
      fetch.step();
      scan(row, Constant<1>{});
    }
  }

  template <int value_>
  struct Constant {
    static constexpr int value = value_;
    constexpr operator int() const { return value_; }
  };
};

// Offers codes to the candidates of a query; the first `count` of the lanes are codes.
template <class V>
void offer_scores(typename V::Floats scores, int64_t count, uint32_t first_id, Candidates& candidates) {
  uint32_t above = V::above(scores, score_of_key(candidates.limit));
  if (__builtin_expect(above == 0, 1)) return;
  if (count < V::lanes) above &= (1u << count) - 1;
  V::add_scores(candidates, above, scores, first_id);
}

// The same by dot products of levels.
template <class V>
void offer_dots(typename V::Word dots, int64_t count, uint32_t first_id, const float* inverse_norms,
                float query_inverse_norm, Candidates& candidates) {
  const auto scores =
      V::multiply(V::multiply(V::to_floats(dots), V::load(inverse_norms, count)), V::all(query_inverse_norm));
  offer_scores<V>(scores, count, first_id, candidates);
}
