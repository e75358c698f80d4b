// SDC with 3 to 8 bits: dot products of bytes, written once over a vector type `V` of 32-bit lanes, under the same
// rules as bit_kernels.inl.
//
// Codes c are unsigned and queries signed bytes, as the byte dot products of every instruction set want them; DotTerms
// make the dot product of the levels of it.
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
    constexpr int8_t ones[4] = {1, 1, 1, 1};
    if constexpr (!wide) {
      V::store(block + s * lanes, merge<s>(planes + 4));
      return sums;
    } else {
      const Word high = merge<s>(planes), low = merge<s>(planes + 4);
      const Word first = V::select(0xf0f0f0f0, V::template shift<4>(high), low);
      const Word second = V::select(0xf0f0f0f0, high, V::template shift<-4>(low));
      V::store(block + 2 * s * lanes, first);
      V::store(block + (2 * s + 1) * lanes, second);
      return V::add_dot_wide(V::add_dot_wide(sums, first, ones), second, ones);
    }
  }

  template <bool wide>
  static void pack(const Rows& codes, int bits, uint32_t* block) {
    constexpr int max_planes = 8;
    constexpr int64_t chunk = 64;  // bytes of a plane
    const int64_t plane_bytes = codes.bytes / bits;
    uint32_t words[max_planes][chunk / 4 * lanes] = {};  // the leading planes that a code does not have stay zero
    for (int64_t row = 0; row < codes.count; row += lanes) {
      const int64_t rows = codes.count - row < lanes ? codes.count - row : lanes;
      Word sums = V::zero();
      for (int64_t done = 0; done < plane_bytes; done += chunk) {
        const int64_t bytes = plane_bytes - done < chunk ? plane_bytes - done : chunk;
        for (int plane = 0; plane < bits; ++plane) {
          const uint8_t* const source = codes.data + row * codes.stride + plane * plane_bytes + done;
          V::gather(source, codes.stride, rows, bytes, words[max_planes - bits + plane]);
        }
        for (int64_t w = 0; w < (bytes + 3) / 4; ++w, block += (wide ? 8 : 4) * lanes) {
          Word planes[max_planes];
          for (int t = wide ? 0 : 4; t < max_planes; ++t) planes[t] = V::load(words[t] + w * lanes);
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
  static void scan_group(const Block& block, int64_t words, const QueryGroup& queries, const uint32_t* members) {
    const int8_t* query[n];
    for (int j = 0; j < n; ++j) query[j] = static_cast<const int8_t*>(queries.data) + members[j] * words * 8;
    const uint32_t* code = static_cast<const uint32_t*>(block.data);
    for (int64_t row = 0; row < block.count; row += lanes) {
      Word dots[n];
      for (int j = 0; j < n; ++j) dots[j] = V::zero();
      for (int64_t w = 0; w < words; ++w) {
        if constexpr (wide) {
          const Word first = V::load(code), second = V::load(code + lanes);
          code += 2 * lanes;
#pragma GCC unroll 8
          for (int j = 0; j < n; ++j) {
            const int8_t* const q = query[j] + w * 8;
            dots[j] = V::add_dot_wide(V::add_dot_wide(dots[j], first, q), second, q + 4);
          }
        } else {
          const Word both = V::load(code);
          const Word low = V::low_halves(both), high = V::high_halves(both);
          code += lanes;
#pragma GCC unroll 8
          for (int j = 0; j < n; ++j) {
            const int8_t* const q = query[j] + w * 8;
            dots[j] = V::add_dot(V::add_dot(dots[j], low, q), high, q + 4);
          }
        }
      }
      Word sums = V::zero();
      if constexpr (wide) {
        sums = V::load(code);
        code += lanes;
      }
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) {
        Candidates& candidates = queries.candidates[members[j]];
        const DotTerms& terms = queries.dot_terms[members[j]];
        const Word level_dots = wide ? V::add(V::add_multiple(terms.constant, dots[j], terms.code_query),
                                              V::add_multiple(0, sums, terms.code))
                                     : V::add_multiple(terms.constant, dots[j], terms.code_query);
        float score[lanes];
        uint32_t above = V::scores_above(level_dots, block.inverse_norms + row, block.count - row,
                                         queries.inverse_norms[members[j]], score_of_key(candidates.limit), score);
        for (; above != 0; above &= above - 1) {
          const int lane = __builtin_ctz(above);
          add_candidate(candidates, key_of_score(score[lane]), block.first_id + static_cast<uint32_t>(row + lane));
        }
      }
    }
  }

  template <bool wide>
  static void scan(const Block& block, int64_t words, const QueryGroup& queries) {
    int64_t first = 0;
    for (; first + group <= queries.count; first += group) {
      scan_group<group, wide>(block, words, queries, queries.members + first);
    }
    for (; first < queries.count; ++first) scan_group<1, wide>(block, words, queries, queries.members + first);
  }

  static void scan_levels(const Block& block, int64_t words, int bits, const QueryGroup& queries) {
    return bits <= 4 ? scan<false>(block, words, queries) : scan<true>(block, words, queries);
  }
};
