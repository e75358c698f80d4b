// SDC with 3 to 8 bits: dot products of bytes, written once over a vector type `V` of 32-bit lanes, under the same
// rules as bit_kernels.inl.
//
// The byte dot products of every instruction set want unsigned codes c and signed queries. With m = 2^bits - 1 levels
// are v = 2 c - m. Up to 4 bits, a query is its levels v', and  v . v' = 2 c . v' - m sum(v').  With more, levels may
// not fit a byte; a query is s = c' - 2^(bits - 1), so that v' = 2 s + 1, and  v . v' = 2 (2 c . s + sum(c)) - 2 m
// sum(s) - m dim. What does not depend on the code is a constant of the query. All in 32 bits, which wrap around
// meanwhile.
//
// A packed word holds 8 dimensions, two c to a byte, or with more than 4 bits one c to a byte of two 32-bit words. Bit
// p of a 32-bit word of a plane belongs to byte p / 8 of the word; packed word s = 0..3 has the c of bit s of each byte
// in the low halves (the first 32-bit word), and the c of bit s + 4 in the high halves (the second one). So every plane
// is shifted once per packed word, all its bytes together, and masks merge the planes. Queries stand in that order of
// dimensions (`dim_of_level`).

template <class V>
struct LevelKernels {
  using Word = typename V::Word;
  static constexpr int64_t lanes = V::lanes;
  static constexpr int64_t group = V::query_group;

  // Plane t of four as bit 3 - t of each half byte, for all lanes.
  template <int s>
  static Word merge(const Word* planes) {
    const Word high = V::select(0x88888888, V::template shift<3 - s>(planes[0]), V::template shift<2 - s>(planes[1]));
    const Word low = V::select(0x22222222, V::template shift<1 - s>(planes[2]), V::template shift<-s>(planes[3]));
    return V::select(0xcccccccc, high, low);
  }

  // Writes packed word s and returns `sums` with the codes in it added.
  template <int s, bool wide>
  static Word pack_word(const Word* planes, uint32_t* block, Word sums) {
    if constexpr (!wide) {
      V::store(block + s * lanes, merge<s>(planes + 4));
      return sums;
    } else {
      const Word high = merge<s>(planes), low = merge<s>(planes + 4);
      const Word first = V::select(0xf0f0f0f0, V::template shift<4>(high), low);
      const Word second = V::select(0xf0f0f0f0, high, V::template shift<-4>(low));
      V::store(block + 2 * s * lanes, first);
      V::store(block + (2 * s + 1) * lanes, second);
      const Word ones = V::splat(0x01010101);
      return V::add_dot_wide(V::add_dot_wide(sums, first, ones), second, ones);
    }
  }

  template <bool wide>
  static void pack(const Rows& codes, int bits, uint32_t* block) {
    constexpr int max_planes = 8;
    constexpr int64_t chunk = 64;  // bytes of a plane
    const int64_t plane_bytes = codes.bytes / bits;
    // Planes of at most a chunk that are a whole number of words are taken up together.
    const bool together = plane_bytes % 4 == 0 && plane_bytes <= chunk;
    const int64_t stride = (together ? plane_bytes : chunk) / 4 * lanes;
    uint32_t words[max_planes * chunk / 4 * lanes] = {};  // the leading planes that a code does not have stay zero
    uint32_t* const first_plane = words + (max_planes - bits) * stride;
    for (int64_t row = 0; row < codes.count; row += lanes) {
      const int64_t rows = codes.count - row < lanes ? codes.count - row : lanes;
      Word sums = V::zero();
      for (int64_t done = 0; done < plane_bytes; done += chunk) {
        const int64_t bytes = plane_bytes - done < chunk ? plane_bytes - done : chunk;
        const uint8_t* const source = codes.data + row * codes.stride + done;
        const int64_t end = together ? codes.bytes : bits * plane_bytes;
        for (int64_t at = 0; at < end; at += together ? chunk : plane_bytes) {
          V::gather(source + at, codes.stride, rows, together ? (end - at < chunk ? end - at : chunk) : bytes,
                    first_plane + (together ? at / 4 * lanes : at / plane_bytes * stride));
        }
        for (int64_t w = 0; w < (bytes + 3) / 4; ++w, block += (wide ? 8 : 4) * lanes) {
          Word planes[max_planes];
          for (int t = wide ? 0 : 4; t < max_planes; ++t) planes[t] = V::load(words + t * stride + w * lanes);
          sums = pack_word<0, wide>(planes, block, sums);
          sums = pack_word<1, wide>(planes, block, sums);
          sums = pack_word<2, wide>(planes, block, sums);
          sums = pack_word<3, wide>(planes, block, sums);
        }
      }
      if constexpr (wide) {
        V::store(block, sums);
        block += lanes;
      }
    }
  }

  static void pack_levels(const Rows& codes, int bits, uint32_t* block) {
    return bits <= 4 ? pack<false>(codes, bits, block) : pack<true>(codes, bits, block);
  }

  template <int n, bool wide>
  static void scan_group(const Block& block, int64_t words, const QueryGroup& queries, int64_t first) {
    const uint32_t* const members = queries.members + first;
    const int8_t* query[n];
    int32_t start[n];  // sums begin here, so that those of codes that may be wanted are 0 or more
    for (int j = 0; j < n; ++j) {
      query[j] = static_cast<const int8_t*>(queries.data) + members[j] * words * 8;
      const int64_t least = least_dot(score_of_key(queries.candidates[members[j]].limit),
                                      queries.inverse_norms[members[j]], block.largest_inverse_norm);
      // 2 sum + constant > least  where  sum - (least - constant) / 2, rounded down, is more than 0.
      start[j] = static_cast<int32_t>(-1 - ((least - queries.constants[members[j]]) >> 1));
    }
    const uint32_t* code = static_cast<const uint32_t*>(block.data);
    Fetch fetch(block, first, n, queries.count, (block.count + lanes - 1) / lanes);
    for (int64_t row = 0; row < block.count; row += lanes) {
      fetch.step();
      Word dots[n];
      for (int j = 0; j < n; ++j) dots[j] = wide ? V::zero() : V::splat(start[j]);
      for (int64_t w = 0; w < words; ++w, code += (wide ? 2 : 1) * lanes) {
        const Word both = V::load(code);
        const Word low = wide ? both : V::low_halves(both);
        const Word high = wide ? V::load(code + lanes) : V::high_halves(both);
#pragma GCC unroll 8
        for (int j = 0; j < n; ++j) {
          const Word q0 = V::four_bytes(query[j] + w * 8), q1 = V::four_bytes(query[j] + w * 8 + 4);
          dots[j] = wide ? V::add_dot_wide(V::add_dot_wide(dots[j], low, q0), high, q1)
                         : V::add_dot(V::add_dot(dots[j], low, q0), high, q1);
        }
      }
      if constexpr (wide) {
        const Word sums = V::load(code);
        code += lanes;
        for (int j = 0; j < n; ++j) {
          dots[j] = V::add(V::add(V::add(dots[j], dots[j]), sums), V::splat(start[j]));
        }
      }
      Word signs = dots[0];
#pragma GCC unroll 8
      for (int j = 1; j < n; ++j) signs = V::intersect(signs, dots[j]);
      if (__builtin_expect(!V::any_positive(signs), 1)) continue;
      for (int j = 0; j < n; ++j) {
        if (!V::any_positive(dots[j])) continue;
        // Back to the dot product of levels.
        const Word sum = V::add(dots[j], V::splat(-start[j]));
        add_above(block, row, queries, members[j], V::add(V::add(sum, sum), V::splat(queries.constants[members[j]])));
      }
    }
  }

  static void add_above(const Block& block, int64_t row, const QueryGroup& queries, uint32_t query, Word dots) {
    Candidates& candidates = queries.candidates[query];
    float score[lanes];
    uint32_t above = V::scores_above(dots, block.inverse_norms + row, block.count - row, queries.inverse_norms[query],
                                     score_of_key(candidates.limit), score);
    for (; above != 0; above &= above - 1) {
      const int lane = __builtin_ctz(above);
      add_candidate(candidates, key_of_score(score[lane]), block.first_id + static_cast<uint32_t>(row + lane));
    }
  }

  template <bool wide>
  static void scan(const Block& block, int64_t words, const QueryGroup& queries) {
    int64_t first = 0;
    for (; first + group <= queries.count; first += group) {
      scan_group<group, wide>(block, words, queries, first);
    }
    for (; first < queries.count; ++first) scan_group<1, wide>(block, words, queries, first);
  }

  static void scan_levels(const Block& block, int64_t words, int bits, const QueryGroup& queries) {
    return bits <= 4 ? scan<false>(block, words, queries) : scan<true>(block, words, queries);
  }
};
