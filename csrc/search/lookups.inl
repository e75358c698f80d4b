// Products by look-up, written once over a vector type `V` of bytes and 32-bit lanes (lookups_*.inl): for every few
// bits of a plane the table of a query has what they contribute, and one byte permutation looks up as many codes as
// there are bytes in a register. Entries are small (Lookups), so that a few of them are summed in bytes, and all in 16
// bits. Included in the anonymous namespace of the level.

template <class V>
struct LookupKernels {
  using Word = typename V::Word;
  static constexpr int64_t lanes = V::lanes;
  static constexpr int64_t codes = 4 * lanes;
  static constexpr int64_t table_bytes = 1 << V::index_bits;
  static constexpr int64_t chunk_bytes = V::index_bits * lookup_chunk / 8;
  // Tables of four queries that stay in the first-level cache while all codes of a block go past.
  static constexpr int64_t most_groups = 5632 / table_bytes / lookup_chunk * lookup_chunk;
  // Queries that share the indices of codes, and times `codes` codes that share their tables.
  static constexpr int query_group = 4;
  static constexpr int row_groups(int queries) { return queries == 1 ? 4 : V::lookup_rows; }

  // Where a code stands among the bytes of a register, so that sums widened twice by `V::widen` are in order.
  static constexpr int64_t place_of(int64_t code) {
    const int64_t part = code / lanes, lane = code % lanes / 4, byte = code % 4;
    return 16 * lane + 4 * part + byte;
  }

  static void pack(const Rows& rows, int planes, uint8_t* block) {
    const int64_t plane_bytes = rows.bytes / planes;
    for (int64_t row = 0; row < rows.count; row += codes) {
      const int64_t count = rows.count - row < codes ? rows.count - row : codes;
      for (int plane = 0; plane < planes; ++plane) {
        const uint8_t* const source = rows.data + row * rows.stride + plane * plane_bytes;
        for (int64_t done = 0; done < plane_bytes; done += chunk_bytes, block += lookup_chunk * codes) {
          uint64_t words[codes];
          if (count < codes) {
            for (int64_t i = 0; i < codes; ++i) words[i] = 0;
          }
          const int64_t left = plane_bytes - done;
          for (int64_t i = 0; i < count; ++i) {
            const uint8_t* const from = source + i * rows.stride + done;
            uint64_t& word = words[place_of(i)];
            if (left >= 8) {
              __builtin_memcpy(&word, from, 8);
            } else if (plane_bytes >= 8) {
              __builtin_memcpy(&word, from + left - 8, 8);
              word >>= 8 * (8 - left);
            } else {
              word = 0;
              for (int64_t byte = 0; byte < left; ++byte) word |= uint64_t{from[byte]} << (8 * byte);
            }
          }
          V::indices(words, block);
        }
      }
    }
  }

  // Sums of 16 bits: of the even bytes, which those of the odd ones above spoil, and of the odd ones.
  struct Sums {
    Word low, high;

    Word even() const { return V::subtract_pairs(low, V::to_odd_bytes(high)); }
    void widen(Word (&words)[4]) const { V::widen(even(), high, words); }
  };

  // Look-ups in groups [first, last) of all planes, the most significant one first, of m times `codes` codes for n
  // queries, to sums[m][n], to which the group before, if there is any, has added.
  template <int n, int m, int in_bytes>
  static void add(const uint8_t* indices, int64_t plane_bytes, int planes, const uint8_t* const (&tables)[n],
                  int64_t first, int64_t last, bool is_first, Sums* sums) {
    Word low[m][n], high[m][n];
#pragma GCC unroll 4
    for (int i = 0; i < m; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < n; ++j) low[i][j] = high[i][j] = V::zero();
    }
    for (int plane = 0;; indices += plane_bytes) {
      for (int64_t g = first; g < last; g += in_bytes) {
        Word found[m][n];
#pragma GCC unroll 8
        for (int step = 0; step < in_bytes; ++step) {
          Word index[m];
#pragma GCC unroll 4
          for (int i = 0; i < m; ++i) index[i] = V::load_bytes(indices + i * planes * plane_bytes + (g + step) * codes);
#pragma GCC unroll 4
          for (int j = 0; j < n; ++j) {
            const auto table = V::load_table(tables[j] + (g + step) * table_bytes);
#pragma GCC unroll 4
            for (int i = 0; i < m; ++i) {
              const Word entries = V::look_up(table, index[i]);
              found[i][j] = step == 0 ? entries : V::add_bytes(found[i][j], entries);
            }
          }
        }
#pragma GCC unroll 4
        for (int i = 0; i < m; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < n; ++j) {
            low[i][j] = V::add_pairs(low[i][j], found[i][j]);
            high[i][j] = V::add_pairs(high[i][j], V::odd_bytes(found[i][j]));
          }
        }
      }
      if (++plane == planes) break;
#pragma GCC unroll 4
      for (int i = 0; i < m; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < n; ++j) {
          low[i][j] = V::add_pairs(low[i][j], low[i][j]);
          high[i][j] = V::add_pairs(high[i][j], high[i][j]);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < m; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < n; ++j) {
        Sums& to = sums[i * n + j];
        to.low = is_first ? low[i][j] : V::add_pairs(to.low, low[i][j]);
        to.high = is_first ? high[i][j] : V::add_pairs(to.high, high[i][j]);
      }
    }
  }

  // The sums [block.count / codes, rounded up][n] of look-ups in groups [first, last), of as many as fit 16 bits.
  template <int n, int in_bytes>
  static void sum(const Block& block, int64_t groups, int planes, const uint8_t* const (&tables)[n], int64_t first,
                  int64_t last, Fetch& fetch, Sums* sums) {
    constexpr int m = row_groups(n);
    const int64_t plane_bytes = (groups + lookup_chunk - 1) / lookup_chunk * lookup_chunk * codes;
    const int64_t parts = (last - first + most_groups - 1) / most_groups;
    const int64_t part = ((last - first + parts - 1) / parts + in_bytes - 1) / in_bytes * in_bytes;
    for (int64_t from = first; from < last; from += part) {
      const int64_t to = last - from < part ? last : from + part;
      const uint8_t* indices = static_cast<const uint8_t*>(block.data);
      Sums* of_rows = sums;
      int64_t left = (block.count + codes - 1) / codes;
      const auto take = [&](auto some) __attribute__((always_inline)) {
        constexpr int count = decltype(some)::value;
        for (; left >= count; left -= count) {
          for (int i = 0; i < count; ++i) fetch.step();
          add<n, count, in_bytes>(indices, plane_bytes, planes, tables, from, to, from == first, of_rows);
          indices += count * planes * plane_bytes;
          of_rows += count * n;
        }
      };
      take(Count<m>{});
      if constexpr (m > 1) take(Count<1>{});
    }
  }

  // Calls scan(first, n) for queries [first, first + n).
  template <class Scan>
  static void for_groups(int64_t queries, const Scan& scan) {
    int64_t first = 0;
    for (; first + query_group <= queries; first += query_group) scan(first, Count<query_group>{});
    for (; first < queries; ++first) scan(first, Count<1>{});
  }

  template <int value_>
  struct Count {
    static constexpr int value = value_;
  };

  // ---- SDC with 2 bits ----

  template <int n>
  static void scan_group(const Block& block, int64_t groups, const QueryGroup& queries, int64_t query_bytes,
                         int64_t first) {
    const uint32_t* const members = queries.members + first;
    const uint8_t* tables[n];
    int64_t least[n];  // of a sum that may be wanted:  2 sum + constant > least dot product
    for (int j = 0; j < n; ++j) {
      tables[j] = static_cast<const uint8_t*>(queries.data) + members[j] * query_bytes;
      const int64_t dot = least_dot(score_of_key(queries.candidates[members[j]].limit),
                                    queries.inverse_norms[members[j]], block.largest_inverse_norm);
      least[j] = ((dot - queries.constants[members[j]]) >> 1) + 1;
    }
    Sums sums[most_lookup_rows / codes * n];
    Fetch fetch(block, first, n, queries.count, (block.count + codes - 1) / codes);
    sum<n, lookups_of_levels>(block, groups, 2, tables, 0, groups, fetch, sums);
    const Sums* of_rows = sums;
    for (int64_t row = 0; row < block.count; row += codes, of_rows += n) {
#pragma GCC unroll 4
      for (int j = 0; j < n; ++j) {
        if (__builtin_expect(!V::any_pair_from(of_rows[j].even(), of_rows[j].high, least[j]), 1)) continue;
        offer(block, row, queries, members[j], of_rows[j]);
      }
    }
  }

  static __attribute__((noinline)) void offer(const Block& block, int64_t row, const QueryGroup& queries,
                                              uint32_t query, const Sums& sums) {
    Word words[4];
    sums.widen(words);
    for (int i = 0; i < 4 && row < block.count; ++i, row += lanes) {
      offer_dots<V>(V::add(V::add(words[i], words[i]), V::splat(queries.constants[query])), block.count - row,
                    block.first_id + static_cast<uint32_t>(row), block.inverse_norms + row,
                    queries.inverse_norms[query], queries.candidates[query]);
    }
  }

  static void scan_two_bits(const Block& block, int64_t groups, int64_t query_bytes, const QueryGroup& queries) {
    for_groups(queries.count, [&](int64_t first, auto n) {
      scan_group<decltype(n)::value>(block, groups, queries, query_bytes, first);
    });
  }

  static constexpr Lookups table = {codes, V::index_bits, pack, scan_two_bits};
};
