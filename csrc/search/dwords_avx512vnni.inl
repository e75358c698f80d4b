// Sixteen 32-bit lanes of four bytes, an integer or a float each. Included in the anonymous namespace of the level,
// after search/kernels.hpp and search/score.hpp.

inline __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1; }

inline __m512i load_bytes(const uint8_t* p, __mmask64 mask) { return _mm512_maskz_loadu_epi8(mask, p); }

// Eight rows of eight words become, word by word, the words of all rows.
inline __attribute__((always_inline)) void transpose(__m512i (&rows)[8]) {
  __m512i pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm512_unpacklo_epi64(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi64(rows[i], rows[i + 1]);
  }
  for (int half = 0; half < 8; half += 4) {
    for (int i = 0; i < 2; ++i) {
      quads[half + i] = _mm512_shuffle_i64x2(pairs[half + i], pairs[half + 2 + i], 0x88);
      quads[half + 2 + i] = _mm512_shuffle_i64x2(pairs[half + i], pairs[half + 2 + i], 0xdd);
    }
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i64x2(quads[i], quads[4 + i], 0x88);
    rows[4 + i] = _mm512_shuffle_i64x2(quads[i], quads[4 + i], 0xdd);
  }
}

// Eight words of eight bytes become, byte by byte, the bytes of all words.
inline __attribute__((always_inline)) __m512i transpose_bytes(__m512i words) {
  constexpr int64_t each = 0x0101010101010101;
  const __m512i turn =
      _mm512_add_epi8(_mm512_set1_epi64(0x3830282018100800),
                      _mm512_set_epi64(7 * each, 6 * each, 5 * each, 4 * each, 3 * each, 2 * each, each, 0));
  return _mm512_permutexvar_epi8(turn, words);
}

struct Dwords {
  using Word = __m512i;
  using Floats = __m512;
  static constexpr int64_t lanes = 16;

  static Word load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint32_t* p, Word a) { _mm512_storeu_si512(p, a); }
  static Word zero() { return _mm512_setzero_si512(); }
  static Word splat(int32_t a) { return _mm512_set1_epi32(a); }
  static Word add(Word a, Word b) { return _mm512_add_epi32(a, b); }
  static Word subtract(Word a, Word b) { return _mm512_sub_epi32(a, b); }
  static Word intersect(Word a, Word b) { return _mm512_and_si512(a, b); }
  // Whether a lane is 0 or more.
  static bool any_positive(Word a) { return _mm512_movepi32_mask(a) != 0xffff; }

  static Word low_halves(Word a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
  static Word high_halves(Word a) { return low_halves(_mm512_srli_epi32(a, 4)); }
  static Word four_bytes(const uint8_t* query) {
    int32_t bytes;
    __builtin_memcpy(&bytes, query, sizeof bytes);
    return _mm512_set1_epi32(bytes);
  }
  static Word add_dot(Word sums, Word codes, Word query) { return _mm512_dpbusd_epi32(sums, codes, query); }
  static Word add_dot_wide(Word sums, Word codes, Word query) { return add_dot(sums, codes, query); }
  // Groups of codes that `queries` queries meet at once. A product takes four steps: fewer than four sums would wait.
  static constexpr int row_groups(int queries) { return queries == 1 ? 4 : 2; }

  static Floats to_floats(Word a) { return _mm512_cvtepi32_ps(a); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  // The first `count`, the rest zero.
  static Floats load(const float* p, int64_t count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_bytes(count)), p);
  }
  // Four floats each of as many codes as there are lanes, parted.
  static void load_four(const float* p, Floats (&parted)[4]) {
    const Floats a = load(p), b = load(p + 16), c = load(p + 32), d = load(p + 48);
    const __m512i first = _mm512_set_epi32(29, 25, 21, 17, 13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
    const __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(2));
    const Floats first_low = _mm512_permutex2var_ps(a, first, b), first_high = _mm512_permutex2var_ps(c, first, d);
    const Floats last_low = _mm512_permutex2var_ps(a, last, b), last_high = _mm512_permutex2var_ps(c, last, d);
    parted[0] = _mm512_shuffle_f32x4(first_low, first_high, 0x44);
    parted[1] = _mm512_shuffle_f32x4(first_low, first_high, 0xee);
    parted[2] = _mm512_shuffle_f32x4(last_low, last_high, 0x44);
    parted[3] = _mm512_shuffle_f32x4(last_low, last_high, 0xee);
  }
  static void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
  static Floats all(float a) { return _mm512_set1_ps(a); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static uint32_t above(Floats a, float limit) { return _mm512_cmp_ps_mask(a, all(limit), _CMP_GT_OQ); }

  // Adds the lanes whose bit is set in `which`, of keys and ids from `first_id` on. Without a branch for each: which
  // they are is as good as random.
  static void add_keys(Candidates& candidates, uint32_t which, Word keys, uint32_t first_id) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i ids = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first_id)), lane);
    const auto mask = static_cast<__mmask16>(which);
    const __m512i some_keys = _mm512_maskz_compress_epi32(mask, keys),
                  some_ids = _mm512_maskz_compress_epi32(mask, ids);
    const __m512i first = _mm512_set_epi32(7, 23, 6, 22, 5, 21, 4, 20, 3, 19, 2, 18, 1, 17, 0, 16);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    uint64_t* const end = candidates.entries + candidates.count;
    const int count = __builtin_popcount(which);
    _mm512_storeu_si512(end, _mm512_permutex2var_epi32(some_keys, first, some_ids));
    if (count > 8) _mm512_storeu_si512(end + 8, _mm512_permutex2var_epi32(some_keys, second, some_ids));
    count_added(candidates, count);
  }
  static void add_scores(Candidates& candidates, uint32_t which, Floats scores, uint32_t first_id) {
    // key_of_score of score.hpp.
    const __m512i bits = _mm512_castps_si512(scores), most = _mm512_set1_epi32(INT32_MAX);
    const __m512i ascending = _mm512_ternarylogic_epi32(bits, _mm512_srai_epi32(bits, 31), most, 0x78);
    add_keys(candidates, which, _mm512_sub_epi32(most, ascending), first_id);
  }
};

#include "search/byte_products.inl"
