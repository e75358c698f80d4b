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

// Products by look-up: fewer dimensions at a time than there are bits in a byte, but as many codes at a time as there
// are bytes in a register. Entries are at most 15 index_bits, so that a few of them are summed in bytes.
template <class V>
struct ScalarLookupKernels {
  using Word = typename V::Word;
  using Scores = ScalarScores<V>;
  static constexpr int64_t lanes = V::lanes;
  static constexpr int64_t codes = 4 * lanes;
  static constexpr int64_t table_bytes = 1 << V::index_bits;
  static constexpr int in_bytes = 255 / (15 * V::index_bits);
  static constexpr int group = V::lookup_queries;
  // Tables of a group of queries that stay in the first-level cache while all codes of a block go past. Their sums fit
  // 16 bits.
  static constexpr int64_t most_groups = (5632 / table_bytes + in_bytes - 1) / in_bytes * in_bytes;

  // Where a code stands among the bytes of a register, so that sums widened twice by `V::widen` are in order.
  static constexpr int64_t place_of(int64_t code) {
    const int64_t part = code / lanes, lane = code % lanes / 4, byte = code % 4;
    return 16 * lane + 4 * part + byte;
  }

  // Adds 2^shift times the sums of look-ups in groups [first, last) to the sums of `codes` codes.
  template <int n>
  static void look_up(const uint8_t* indices, const uint8_t* const (&tables)[n], int64_t first, int64_t last, int shift,
                      int32_t* const (&sums)[n]) {
    Word low[n], high[n];
    for (int j = 0; j < n; ++j) low[j] = high[j] = V::zero();
    for (int64_t g = first; g < last; g += in_bytes) {
      Word index[in_bytes];
      for (int i = 0; i < in_bytes; ++i) index[i] = V::load_bytes(indices + (g + i) * codes);
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) {
        Word found = V::look_up(tables[j] + g * table_bytes, index[0]);
        for (int i = 1; i < in_bytes; ++i) {
          found = V::add_bytes(found, V::look_up(tables[j] + (g + i) * table_bytes, index[i]));
        }
        // Sums of the even bytes, which those of the odd ones above spoil, and of the odd ones.
        low[j] = V::add_pairs(low[j], found);
        high[j] = V::add_pairs(high[j], V::odd_bytes(found));
      }
    }
    for (int j = 0; j < n; ++j) {
      Word parts[4];
      V::widen(V::subtract_pairs(low[j], V::to_odd_bytes(high[j])), high[j], parts);
      for (int i = 0; i < 4; ++i) {
        uint32_t* const sum = reinterpret_cast<uint32_t*>(sums[j]) + i * lanes;
        V::store(sum, V::add(V::load(sum), V::shift_left(parts[i], shift)));
      }
    }
  }

  template <int n>
  static void scan_group(const Block& block, const BlockFactors& factors, int64_t groups, int planes, int parts,
                         const ScalarQueryGroup& queries, int64_t first) {
    const uint32_t* const members = queries.members + first;
    alignas(64) int32_t sums[n][most_lookup_rows];
    // Biases enter every look-up of the last part, with the weights of the planes.
    const int32_t bias =
        static_cast<int32_t>(groups * table_bias(V::index_bits) * ((1 << planes) - 1) << half_byte_bits * (parts - 1));
    for (int j = 0; j < n; ++j) {
      for (int64_t i = 0; i < (block.count + codes - 1) / codes * codes; ++i) sums[j][i] = -bias;
    }
    const int64_t row_groups = (block.count + codes - 1) / codes;
    Fetch fetch(block, first, n, queries.count, row_groups);
    for (int64_t g = 0; g < groups; g += most_groups) {
      const int64_t last = g + most_groups < groups ? g + most_groups : groups;
      for (int64_t row_group = 0; row_group < row_groups; ++row_group) {
        fetch.step();
        for (int plane = 0; plane < planes; ++plane) {
          const uint8_t* const indices =
              static_cast<const uint8_t*>(block.data) + (row_group * planes + plane) * groups * codes;
          for (int part = 0; part < parts; ++part) {
            const uint8_t* tables[n];
            int32_t* to[n];
            for (int j = 0; j < n; ++j) {
              tables[j] = queries.data + (members[j] * parts + part) * queries.bytes;
              to[j] = sums[j] + row_group * codes;
            }
            look_up<n>(indices, tables, g, last, planes - 1 - plane + half_byte_bits * part, to);
          }
        }
      }
    }
    for (int64_t row = 0; row < block.count; row += lanes) {
      const Scores scores(factors, row);
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) {
        const Word products = V::load(reinterpret_cast<const uint32_t*>(sums[j]) + row);
        Scores::offer(block, row, queries.candidates[members[j]],
                      scores.of(V::to_floats(products), queries.queries[members[j]]));
      }
    }
  }

  static void scan(const Block& block, const BlockFactors& factors, int64_t groups, int planes, int parts,
                   const ScalarQueryGroup& queries) {
    int64_t first = 0;
    for (; first + group <= queries.count; first += group) {
      scan_group<group>(block, factors, groups, planes, parts, queries, first);
    }
    for (; first < queries.count; ++first) scan_group<1>(block, factors, groups, planes, parts, queries, first);
  }

  static void pack(const Rows& rows, int planes, uint8_t* block) {
    const int64_t plane_bytes = rows.bytes / planes;
    for (int64_t row = 0; row < rows.count; row += codes) {
      const int64_t count = rows.count - row < codes ? rows.count - row : codes;
      for (int plane = 0; plane < planes; ++plane) {
        const uint8_t* const source = rows.data + row * rows.stride + plane * plane_bytes;
        for (int64_t done = 0; done < plane_bytes; done += V::chunk_bytes, block += V::chunk_groups * codes) {
          const int64_t left = plane_bytes - done < 8 ? plane_bytes - done : 8;
          uint64_t words[codes];
          for (int64_t i = 0; i < codes; ++i) words[place_of(i)] = 0;
          for (int64_t i = 0; i < count; ++i) {
            __builtin_memcpy(words + place_of(i), source + i * rows.stride + done, static_cast<unsigned long>(left));
          }
          V::indices(words, block);
        }
      }
    }
  }

  static constexpr ScalarLookups table = {codes, V::index_bits, V::chunk_bytes, V::chunk_groups, pack, scan};
};
