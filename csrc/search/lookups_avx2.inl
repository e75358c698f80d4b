// The byte shuffle looks up 4 bits. Included in the anonymous namespace of the level, after dwords_avx2.inl.

struct LookupBytes : Dwords {
  static constexpr int64_t index_bits = 4;
  static constexpr int lookup_rows = 1;

  static Word load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Word load_table(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Word look_up(Word table, Word index) { return _mm256_shuffle_epi8(table, index); }
  static Word add_bytes(Word a, Word b) {
    Word sum = _mm256_add_epi8(a, b);
    asm("" : "+x"(sum));  // one after the other: a tree of sums would not fit the registers
    return sum;
  }
  static Word add_pairs(Word a, Word b) { return _mm256_add_epi16(a, b); }
  static Word subtract_pairs(Word a, Word b) { return _mm256_sub_epi16(a, b); }
  static Word odd_bytes(Word a) { return _mm256_srli_epi16(a, 8); }
  static Word to_odd_bytes(Word a) { return _mm256_slli_epi16(a, 8); }
  static Word shift_left(Word a, int count) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(count)); }
  // Whether any of the sums of 16 bits is `least` or more.
  static bool any_pair_from(Word a, Word b, int64_t least) {
    if (least > UINT16_MAX) return false;
    const Word bound = _mm256_set1_epi16(static_cast<short>(least < 0 ? 0 : least)), most = _mm256_max_epu16(a, b);
    return _mm256_movemask_epi8(_mm256_cmpeq_epi16(_mm256_max_epu16(most, bound), most)) != 0;
  }
  // Sums of the even and of the odd bytes as words, four of each 128 bits at a time.
  static void widen(Word even, Word odd, Word (&words)[4]) {
    const Word low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
    words[0] = _mm256_unpacklo_epi16(low, zero());
    words[1] = _mm256_unpackhi_epi16(low, zero());
    words[2] = _mm256_unpacklo_epi16(high, zero());
    words[3] = _mm256_unpackhi_epi16(high, zero());
  }
  // The half bytes of the first four bytes of 32 words.
  static void indices(const uint64_t* words, uint8_t* out) {
    for (int byte = 0; byte < 4; ++byte, out += 64) {
      uint8_t bytes[32];
      for (int i = 0; i < 32; ++i) bytes[i] = static_cast<uint8_t>(words[i] >> (8 * byte));
      const Word both = load_bytes(bytes);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), low_halves(both));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32), high_halves(both));
    }
  }
};

#include "search/lookups.inl"
