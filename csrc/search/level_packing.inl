// Bit planes merged to packed words of bytes or half bytes, written once over a vector type `V` of 32-bit lanes
// (dwords_*.inl) with shifts and merges besides. Each instruction-set file includes this in an anonymous namespace of
// its level.
//
// A packed word holds 8 dimensions, two c to a byte, or with more than 4 bits one c to a byte of two 32-bit words. Bit
// p of a 32-bit word of a plane belongs to byte p / 8 of the word; packed word s = 0..3 has the c of bit s of each byte
// in the low halves (the first 32-bit word), and the c of bit s + 4 in the high halves (the second one). So every plane
// is shifted once per packed word, all its bytes together, and masks merge the planes.

template <class V>
struct LevelPacking {
  using Word = typename V::Word;
  static constexpr int64_t lanes = V::lanes;

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

  static int64_t dim_of_level(int64_t index, bool) {
    const int64_t word = index / 32, s = index / 8 % 4, half = index / 4 % 2, byte = index % 4;
    return word * 32 + byte * 8 + 7 - (s + 4 * half);
  }
};
