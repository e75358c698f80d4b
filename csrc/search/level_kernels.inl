// SDC with 3 or 4 bits: dot products of bytes, written once over a vector type `V` of 32-bit lanes, under the same
// rules as bit_kernels.inl.
//
// Codes c are unsigned, the queries' levels v' signed bytes (|v'| <= 15), as the byte dot products of every instruction
// set want them; with m = 2^bits - 1 the dot product of the levels is  sum (2c - m) v' = 2 sum c v' - m sum v'.
//
// A packed block holds two c to a byte. Bit p of a 32-bit word of a plane belongs to byte p / 8 of the word; a packed
// word s = 0..3 has, in each byte, the c of bit s in its low half and the c of bit s + 4 in its high half. So every
// plane is shifted once per packed word, all its bytes together, and masks merge the planes. Levels of queries stand in
// that order of dimensions (`dim_of_level`).

template <class V>
struct LevelKernels {
  using Word = typename V::Word;
  static constexpr int64_t lanes = V::lanes;
  static constexpr int64_t group = V::query_group;
  static constexpr int max_planes = 4;

  // Plane t of the code as bit 3 - t of each half byte, for all lanes; `planes` has zeros where the code has no plane.
  template <int s>
  static Word merge(const Word (&planes)[max_planes]) {
    const Word high = V::select(0x88888888, V::template shift<3 - s>(planes[0]), V::template shift<2 - s>(planes[1]));
    const Word low = V::select(0x22222222, V::template shift<1 - s>(planes[2]), V::template shift<-s>(planes[3]));
    return V::select(0xcccccccc, high, low);
  }

  static void pack_levels(const Rows& codes, int bits, uint32_t* block) {
    const int64_t plane_bytes = codes.bytes / bits;
    constexpr int64_t chunk = 64;  // bytes of a plane
    uint32_t words[max_planes][chunk / 4 * lanes] = {};
    for (int64_t row = 0; row < codes.count; row += lanes) {
      const int64_t rows = codes.count - row < lanes ? codes.count - row : lanes;
      for (int64_t done = 0; done < plane_bytes; done += chunk) {
        const int64_t bytes = plane_bytes - done < chunk ? plane_bytes - done : chunk;
        for (int plane = 0; plane < bits; ++plane) {
          const uint8_t* const source = codes.data + row * codes.stride + plane * plane_bytes + done;
          V::gather(source, codes.stride, rows, bytes, words[max_planes - bits + plane]);
        }
        for (int64_t w = 0; w < (bytes + 3) / 4; ++w, block += 4 * lanes) {
          Word planes[max_planes];
          for (int t = 0; t < max_planes; ++t) planes[t] = V::load(words[t] + w * lanes);
          V::store(block, merge<0>(planes));
          V::store(block + lanes, merge<1>(planes));
          V::store(block + 2 * lanes, merge<2>(planes));
          V::store(block + 3 * lanes, merge<3>(planes));
        }
      }
    }
  }

  template <int n>
  static void scan_group(const Block& block, int64_t words, int bits, const QueryGroup& queries, int64_t first) {
    const int8_t* const query = static_cast<const int8_t*>(queries.data) + first * words * 8;
    const uint32_t* code = static_cast<const uint32_t*>(block.data);
    for (int64_t row = 0; row < block.count; row += lanes) {
      Word sums[n];
      for (int j = 0; j < n; ++j) sums[j] = V::zero();
      for (int64_t w = 0; w < words; ++w, code += lanes) {
        const Word both = V::load(code);
        const Word low = V::low_halves(both), high = V::high_halves(both);
#pragma GCC unroll 8
        for (int j = 0; j < n; ++j) {
          const int8_t* const levels = query + (j * words + w) * 8;
          sums[j] = V::add_dot(V::add_dot(sums[j], low, levels), high, levels + 4);
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) {
        Candidates& candidates = queries.candidates[first + j];
        const int32_t offset = ((1 << bits) - 1) * queries.level_sums[first + j];
        float score[lanes];
        uint32_t above = V::scores_above(sums[j], offset, block.inverse_norms + row, block.count - row,
                                         queries.inverse_norms[first + j], score_of_key(candidates.limit), score);
        for (; above != 0; above &= above - 1) {
          const int lane = __builtin_ctz(above);
          add_candidate(candidates, key_of_score(score[lane]), block.first_id + static_cast<uint32_t>(row + lane));
        }
      }
    }
  }

  static void scan_levels(const Block& block, int64_t words, int bits, const QueryGroup& queries) {
    int64_t first = 0;
    for (; first + group <= queries.count; first += group) scan_group<group>(block, words, bits, queries, first);
    for (; first < queries.count; ++first) scan_group<1>(block, words, bits, queries, first);
  }
};
