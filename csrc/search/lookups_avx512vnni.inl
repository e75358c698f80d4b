// VBMI looks up 6 bits. Included in the anonymous namespace of the level, after dwords_avx512vnni.inl.

struct LookupBytes : Dwords {
  static constexpr int64_t index_bits = 6;
  static constexpr int lookup_rows = 2;

  static Word load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Word load_table(const uint8_t* p) {
    Word table = _mm512_loadu_si512(p);
    asm("" : "+v"(table));  // once for all codes, not with each look-up
    return table;
  }
  static Word look_up(Word table, Word index) { return _mm512_permutexvar_epi8(index, table); }
  static Word add_bytes(Word a, Word b) {
    Word sum = _mm512_add_epi8(a, b);
    asm("" : "+v"(sum));  // one after the other: a tree of sums would not fit the registers
    return sum;
  }
  static Word add_pairs(Word a, Word b) { return _mm512_add_epi16(a, b); }
  static Word subtract_pairs(Word a, Word b) { return _mm512_sub_epi16(a, b); }
  static Word odd_bytes(Word a) { return _mm512_srli_epi16(a, 8); }
  static Word to_odd_bytes(Word a) { return _mm512_slli_epi16(a, 8); }
  static Word shift_left(Word a, int count) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(count)); }
  // Whether any of the sums of 16 bits is `least` or more.
  static bool any_pair_from(Word a, Word b, int64_t least) {
    if (least > UINT16_MAX) return false;
    const Word bound = _mm512_set1_epi16(static_cast<short>(least < 0 ? 0 : least));
    return _mm512_cmpge_epu16_mask(_mm512_max_epu16(a, b), bound) != 0;
  }
  // Sums of the even and of the odd bytes as words, four of each 128 bits at a time.
  static void widen(Word even, Word odd, Word (&words)[4]) {
    const Word low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
    words[0] = _mm512_unpacklo_epi16(low, zero());
    words[1] = _mm512_unpackhi_epi16(low, zero());
    words[2] = _mm512_unpacklo_epi16(high, zero());
    words[3] = _mm512_unpackhi_epi16(high, zero());
  }
  // The eight times 6 bits of the first six bytes of 64 words: cut out of eight words at a time, then turned so that
  // each register holds one index of all.
  static void indices(const uint64_t* words, uint8_t* out) {
    const __m512i cuts = _mm512_set1_epi64(0x2a241e18120c0600);
    __m512i rows[8];
    for (int i = 0; i < 8; ++i) {
      const __m512i cut = _mm512_multishift_epi64_epi8(cuts, _mm512_loadu_si512(words + 8 * i));
      rows[i] = transpose_bytes(_mm512_and_si512(cut, _mm512_set1_epi8(63)));
    }
    transpose(rows);
    for (int i = 0; i < 8; ++i) _mm512_storeu_si512(out + 64 * i, rows[i]);
  }
};

#include "search/lookups.inl"
