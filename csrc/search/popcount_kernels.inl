// The popcount kernels, written once over a vector type `V` of 64-bit lanes, and `D` of the 32-bit lanes of its level
// (dwords_*.inl). Each instruction-set file includes this in an anonymous namespace of its level, after
// them, and instantiates BitKernels.
//
// Hamming. Popcounts cost more than logic, so seven words are first added bit by bit with full adders (Harley-Seal:
// Mula, Kurz, Lemire, "Faster Population Counts Using AVX2 Instructions", 2018), leaving three popcounts of weights 1,
// 2 and 4. Of a full adder of x0, x1, x2, with x = code ^ query, the sum and x0 ^ x1 are linear, so they are taken
// beforehand of code and query each ("precoded": one xor gives them for a pair), and the carry is a bitwise choice
// between x0 and the complement of the sum:
//
//     s = x0 ^ x1 ^ x2,  d = x0 ^ x1,  carry = d ? ~s : x0
//
// SDC with 2 bits. With S the xor of the sign planes and b the xor of a code's own two planes (set where its level is
// +-1, clear where it is +-3), the product of two levels is 9 - 2 v with
//
//     v = |S ^ (b & b')| + 3 |S ^ (b | b')| + 5 |S|
//
// so three popcounts do instead of the four of plane by plane. Zero padding adds nothing to v.

template <class V, class D>
struct BitKernels {
  using Word = typename V::Word;
  static constexpr int64_t lanes = V::lanes;
  static constexpr int64_t group = V::query_group;

  // ---- packing ----

  // The words of up to `lanes` rows from `row` on, side by side: word w goes to block + w * step * lanes. Lanes without
  // a row get zeros. `offset` and `bytes` say which part of a row.
  static void gather(const Rows& codes, int64_t row, int64_t offset, int64_t bytes, uint64_t* block, int64_t step) {
    const uint8_t* const source = codes.data + row * codes.stride + offset;
    const int64_t rows = codes.count - row < lanes ? codes.count - row : lanes;
    V::gather(source, codes.stride, rows, bytes, block, step * lanes);
  }

  static void precode_three(uint64_t* words) {
    const Word x0 = V::load(words), x1 = V::load(words + lanes), x2 = V::load(words + 2 * lanes);
    const Word differ = V::exclusive_or(x0, x1);
    V::store(words, V::exclusive_or(differ, x2));
    V::store(words + lanes, differ);
    V::store(words + 2 * lanes, x0);
  }

  static void precode_seven(uint64_t* words) {
    precode_three(words);
    precode_three(words + 3 * lanes);
    const Word sums = V::exclusive_or(V::load(words), V::load(words + 3 * lanes));
    V::store(words + 6 * lanes, V::exclusive_or(sums, V::load(words + 6 * lanes)));
  }

  static void pack_hamming(const Rows& codes, uint64_t* block) {
    const int64_t words = words_of(codes.bytes);
    for (int64_t row = 0; row < codes.count; row += lanes, block += words * lanes) {
      gather(codes, row, 0, codes.bytes, block, 1);
      int64_t w = 0;
      for (; w + 7 <= words; w += 7) precode_seven(block + w * lanes);
      for (; w + 3 <= words; w += 3) precode_three(block + w * lanes);
    }
  }

  static void pack_planes(const Rows& codes, int bits, uint64_t* block) {
    if (bits == 1) return pack_hamming(codes, block);
    const int64_t plane_bytes = codes.bytes / bits;
    const int64_t words = words_of(plane_bytes);
    for (int64_t row = 0; row < codes.count; row += lanes, block += words * bits * lanes) {
      for (int plane = 0; plane < bits; ++plane) {
        gather(codes, row, plane * plane_bytes, plane_bytes, block + plane * lanes, bits);
      }
      for (int64_t w = 0; w < words; ++w) {
        uint64_t* const pair = block + w * 2 * lanes;
        V::store(pair + lanes, V::exclusive_or(V::load(pair), V::load(pair + lanes)));
      }
    }
  }

  // ---- sums of one group of codes against `n` queries, each added to a start of the query ----

  template <int n>
  static void hamming(const uint64_t* code, int64_t words, const uint64_t* const (&query)[n], const int64_t (&start)[n],
                      Word (&distance)[n]) {
    Word ones[n], twos[n], fours[n];
    for (int j = 0; j < n; ++j) {
      ones[j] = V::splat(start[j]);
      twos[j] = fours[j] = V::zero();
    }
    int64_t w = 0;
    for (; w + 7 <= words; w += 7, code += 7 * lanes) {
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) {
        const uint64_t* const q = query[j] + w;
        const Word sum0 = V::exclusive_or(V::load(code), V::broadcast(q));
        const Word carry0 = V::carry(sum0, V::exclusive_or(V::load(code + lanes), V::broadcast(q + 1)),
                                     V::exclusive_or(V::load(code + 2 * lanes), V::broadcast(q + 2)));
        const Word sum1 = V::exclusive_or(V::load(code + 3 * lanes), V::broadcast(q + 3));
        const Word carry1 = V::carry(sum1, V::exclusive_or(V::load(code + 4 * lanes), V::broadcast(q + 4)),
                                     V::exclusive_or(V::load(code + 5 * lanes), V::broadcast(q + 5)));
        const Word sum = V::exclusive_or(V::load(code + 6 * lanes), V::broadcast(q + 6));
        const Word carry2 = V::carry_of_sums(sum, sum0, sum1);
        ones[j] = V::add(ones[j], V::popcount(sum));
        twos[j] = V::add(twos[j], V::popcount(V::exclusive_or(carry0, carry1, carry2)));
        fours[j] = V::add(fours[j], V::popcount(V::majority(carry0, carry1, carry2)));
      }
    }
    for (; w + 3 <= words; w += 3, code += 3 * lanes) {
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) {
        const uint64_t* const q = query[j] + w;
        const Word sum = V::exclusive_or(V::load(code), V::broadcast(q));
        const Word over = V::carry(sum, V::exclusive_or(V::load(code + lanes), V::broadcast(q + 1)),
                                   V::exclusive_or(V::load(code + 2 * lanes), V::broadcast(q + 2)));
        ones[j] = V::add(ones[j], V::popcount(sum));
        twos[j] = V::add(twos[j], V::popcount(over));
      }
    }
    for (; w < words; ++w, code += lanes) {
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) {
        const Word word = V::exclusive_or(V::load(code), V::broadcast(query[j] + w));
        ones[j] = V::add(ones[j], V::popcount(word));
      }
    }
    for (int j = 0; j < n; ++j) {
      const Word half = V::add(V::add(fours[j], fours[j]), twos[j]);
      distance[j] = V::add(V::add(half, half), ones[j]);
    }
  }

  template <int n>
  static void two_bit(const uint64_t* code, int64_t words, const uint64_t* const (&query)[n], const int64_t (&start)[n],
                      Word (&sum)[n]) {
    Word ones[n], threes[n], fives[n];
    for (int j = 0; j < n; ++j) {
      ones[j] = V::splat(start[j]);
      threes[j] = fives[j] = V::zero();
    }
    for (int64_t w = 0; w < 2 * words; w += 2, code += 2 * lanes) {
      const Word code_sign = V::load(code), code_small = V::load(code + lanes);
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) {
        const Word sign = V::exclusive_or(code_sign, V::broadcast(query[j] + w));
        const Word small = V::broadcast(query[j] + w + 1);
        fives[j] = V::add(fives[j], V::popcount(sign));
        threes[j] = V::add(threes[j], V::popcount(V::xor_of_or(sign, code_small, small)));
        ones[j] = V::add(ones[j], V::popcount(V::xor_of_and(sign, code_small, small)));
      }
    }
    for (int j = 0; j < n; ++j) {
      const Word fives_and_threes = V::add(fives[j], threes[j]);
      const Word twice = V::add(fives[j], fives_and_threes);
      sum[j] = V::add(V::add(twice, twice), V::add(fives_and_threes, ones[j]));
    }
  }

  // ---- scans ----

  // `bound(query)`: only sums below it may be wanted, of codes of this block; hit(row, query, sums) takes the sums of
  // some lanes of which are.
  template <int n, class Sums, class Bound, class Hit>
  static void scan_group(const Block& block, int64_t words, const QueryGroup& queries, int64_t first, const Sums& sums,
                         const Bound& bound, const Hit& hit) {
    const uint32_t* const members = queries.members + first;
    const uint64_t* query[n];
    int64_t start[n];  // with it a sum that may be wanted is negative
    for (int j = 0; j < n; ++j) {
      query[j] = static_cast<const uint64_t*>(queries.data) + members[j] * words;
      start[j] = -bound(members[j]);
    }
    const uint64_t* code = static_cast<const uint64_t*>(block.data);
    Fetch fetch(block, first, n, queries.count, (block.count + lanes - 1) / lanes);
    for (int64_t row = 0; row < block.count; row += lanes, code += words * lanes) {
      fetch.step();
      Word result[n];
      sums(code, query, start, result);
      Word signs = result[0];
#pragma GCC unroll 8
      for (int j = 1; j < n; ++j) signs = V::unite(signs, result[j]);
      if (__builtin_expect(!V::any_negative(signs), 1)) continue;
      for (int j = 0; j < n; ++j) {
        if (V::any_negative(result[j])) hit(row, members[j], V::add(result[j], V::splat(-start[j])));
      }
    }
  }

  // Queries in groups that share the loads of a code, what is left over one by one.
  template <class Sums, class Bound, class Hit>
  static void scan(const Block& block, int64_t words, const QueryGroup& queries, const Sums& sums, const Bound& bound,
                   const Hit& hit) {
    int64_t first = 0;
    for (; first + group <= queries.count; first += group) {
      scan_group<group>(block, words, queries, first, sums, bound, hit);
    }
    for (; first < queries.count; ++first) scan_group<1>(block, words, queries, first, sums, bound, hit);
  }

  static auto hamming_sums(int64_t words) {
    return [words](const uint64_t* code, const auto& query, const auto& start, auto& distance) {
      hamming(code, words, query, start, distance);
    };
  }

  static void scan_hamming(const Block& block, int64_t words, const QueryGroup& queries) {
    const auto bound = [&](uint32_t query) -> int64_t { return queries.candidates[query].limit; };
    scan(block, words, queries, hamming_sums(words), bound, [&](int64_t row, int64_t query, Word distances) {
      Candidates& candidates = queries.candidates[query];
      uint32_t below = V::below(distances, candidates.limit);
      if (below == 0) return;
      if (block.count - row < lanes) below &= (1u << (block.count - row)) - 1;
      V::add_lanes(candidates, below, distances, block.first_id + static_cast<uint32_t>(row));
    });
  }

  static void scan_planes(const Block& block, int64_t words, int bits, int64_t dim, const QueryGroup& queries) {
    const int64_t largest = bits == 1 ? dim : 9 * dim;  // dot product = largest - 2 * sum
    const auto bound = [&](uint32_t query) {
      const int64_t least = least_dot(score_of_key(queries.candidates[query].limit), queries.inverse_norms[query],
                                      block.largest_inverse_norm);
      return (largest - least + 1) >> 1;
    };
    const auto hit = [&](int64_t row, int64_t query, Word sum) {
      const int64_t count = block.count - row < lanes ? block.count - row : lanes;
      const auto sums = V::to_dwords(sum);
      offer_dots<D>(D::subtract(D::splat(static_cast<int32_t>(largest)), D::add(sums, sums)), count,
                    block.first_id + static_cast<uint32_t>(row), block.inverse_norms + row,
                    queries.inverse_norms[query], queries.candidates[query]);
    };
    if (bits == 1) return scan(block, words, queries, hamming_sums(words), bound, hit);
    const auto two_bit_sums = [words](const uint64_t* code, const auto& query, const auto& start, auto& sum) {
      two_bit(code, words / 2, query, start, sum);
    };
    scan(block, words, queries, two_bit_sums, bound, hit);
  }
};
