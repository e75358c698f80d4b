// Eight 32-bit lanes of four bytes, an integer or a float each. Included in the anonymous namespace of the level,
// after search/kernels.hpp and search/score.hpp.

struct Dwords {
  using Word = __m256i;
  using Floats = __m256;
  static constexpr int64_t lanes = 8;

  static Word load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(uint32_t* p, Word a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static Word zero() { return _mm256_setzero_si256(); }
  static Word splat(int32_t a) { return _mm256_set1_epi32(a); }
  static Word add(Word a, Word b) { return _mm256_add_epi32(a, b); }
  static Word subtract(Word a, Word b) { return _mm256_sub_epi32(a, b); }
  static Word intersect(Word a, Word b) { return _mm256_and_si256(a, b); }
  // Whether a lane is 0 or more.
  static bool any_positive(Word a) { return _mm256_movemask_ps(_mm256_castsi256_ps(a)) != 0xff; }

  static Word low_halves(Word a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
  static Word high_halves(Word a) { return low_halves(_mm256_srli_epi32(a, 4)); }
  static Word four_bytes(const uint8_t* query) {
    int32_t bytes;
    __builtin_memcpy(&bytes, query, sizeof bytes);
    return _mm256_set1_epi32(bytes);
  }
  // Two products of at most 15 * 128 fit 16 bits.
  static Word add_dot(Word sums, Word codes, Word query) {
    const __m256i pairs = _mm256_maddubs_epi16(codes, query);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  // Two products of 255 * 128 do not: one half of the codes after the other.
  static Word add_dot_wide(Word sums, Word codes, Word query) {
    const __m256i low = _mm256_maddubs_epi16(low_halves(codes), query);
    const __m256i high = _mm256_maddubs_epi16(high_halves(codes), query);
    return _mm256_add_epi32(sums, _mm256_add_epi32(_mm256_madd_epi16(low, _mm256_set1_epi16(1)),
                                                   _mm256_madd_epi16(high, _mm256_set1_epi16(16))));
  }
  // Groups of codes that `queries` queries meet at once: eight sums fill the registers.
  static constexpr int row_groups(int queries) { return queries == 8 ? 1 : 2; }

  static Floats to_floats(Word a) { return _mm256_cvtepi32_ps(a); }
  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  // The first `count`, the rest zero.
  static Floats load(const float* p, int64_t count) {
    if (count >= lanes) return _mm256_loadu_ps(p);
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane));
  }
  // Four floats each of as many codes as there are lanes, parted.
  static void load_four(const float* p, Floats (&parted)[4]) {
    Floats codes[4];  // i and i + 4
    for (int i = 0; i < 4; ++i) {
      codes[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 4 * i)), _mm_loadu_ps(p + 4 * i + 16), 1);
    }
    const Floats low01 = _mm256_unpacklo_ps(codes[0], codes[1]), high01 = _mm256_unpackhi_ps(codes[0], codes[1]);
    const Floats low23 = _mm256_unpacklo_ps(codes[2], codes[3]), high23 = _mm256_unpackhi_ps(codes[2], codes[3]);
    parted[0] = _mm256_shuffle_ps(low01, low23, 0x44);
    parted[1] = _mm256_shuffle_ps(low01, low23, 0xee);
    parted[2] = _mm256_shuffle_ps(high01, high23, 0x44);
    parted[3] = _mm256_shuffle_ps(high01, high23, 0xee);
  }
  static void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
  static Floats all(float a) { return _mm256_set1_ps(a); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static uint32_t above(Floats a, float limit) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, all(limit), _CMP_GT_OQ)));
  }
  // Adds the lanes whose bit is set in `which`.
  static void add_scores(Candidates& candidates, uint32_t which, Floats scores, uint32_t first_id) {
    float score[lanes];
    _mm256_storeu_ps(score, scores);
    for (; which != 0; which &= which - 1) {
      const int lane = __builtin_ctz(which);
      add_candidate(candidates, key_of_score(score[lane]), first_id + static_cast<uint32_t>(lane));
    }
  }
};

#include "search/byte_products.inl"
