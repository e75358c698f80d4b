#include <immintrin.h>

#include "search/scalar_codes_kernels.hpp"
#include "search/score.hpp"

namespace fastembed::search::avx512vnni {
namespace {

#include "search/scalar_codes.inl"

struct Sixteen {
  using Word = __m512i;
  using Floats = __m512;
  static constexpr int64_t lanes = 16;

  static Word zero() { return _mm512_setzero_si512(); }
  static Word load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static Word low_halves(Word a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
  static Word high_halves(Word a) { return low_halves(_mm512_srli_epi32(a, 4)); }
  static Word four_bytes(const uint8_t* query) {
    int32_t bytes;
    __builtin_memcpy(&bytes, query, sizeof bytes);
    return _mm512_set1_epi32(bytes);
  }
  static Word add_dot(Word sums, Word codes, Word query) { return _mm512_dpbusd_epi32(sums, codes, query); }
  static Word add_dot_wide(Word sums, Word codes, Word query) { return add_dot(sums, codes, query); }

  static Floats to_floats(Word a) { return _mm512_cvtepi32_ps(a); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
  static Floats all(float a) { return _mm512_set1_ps(a); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static uint32_t above(Floats a, float limit) { return _mm512_cmp_ps_mask(a, all(limit), _CMP_GT_OQ); }

  // VBMI looks up 6 bits.
  static constexpr int lookup_queries = 4;
  static constexpr int64_t index_bits = 6, chunk_bytes = 6, chunk_groups = 8;

  static Word load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Word look_up(const uint8_t* table, Word index) {
    return _mm512_permutexvar_epi8(index, _mm512_loadu_si512(table));
  }
  static Word add_bytes(Word a, Word b) { return _mm512_add_epi8(a, b); }
  static Word add_pairs(Word a, Word b) { return _mm512_add_epi16(a, b); }
  static Word subtract_pairs(Word a, Word b) { return _mm512_sub_epi16(a, b); }
  static Word odd_bytes(Word a) { return _mm512_srli_epi16(a, 8); }
  static Word to_odd_bytes(Word a) { return _mm512_slli_epi16(a, 8); }
  static Word add_words(Word a, Word b) { return _mm512_add_epi32(a, b); }
  static Word shift_left(Word a, int count) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(count)); }
  static void store(uint32_t* p, Word a) { _mm512_storeu_si512(p, a); }
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
    constexpr int64_t each = 0x0101010101010101;
    const __m512i turn =
        _mm512_add_epi8(_mm512_set1_epi64(0x3830282018100800),
                        _mm512_set_epi64(7 * each, 6 * each, 5 * each, 4 * each, 3 * each, 2 * each, each, 0));
    __m512i rows[8], pairs[8], quads[8];
    for (int i = 0; i < 8; ++i) {
      const __m512i cut = _mm512_multishift_epi64_epi8(cuts, _mm512_loadu_si512(words + 8 * i));
      rows[i] = _mm512_permutexvar_epi8(turn, _mm512_and_si512(cut, _mm512_set1_epi8(63)));
    }
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
      _mm512_storeu_si512(out + 64 * i, _mm512_shuffle_i64x2(quads[i], quads[4 + i], 0x88));
      _mm512_storeu_si512(out + 64 * (4 + i), _mm512_shuffle_i64x2(quads[i], quads[4 + i], 0xdd));
    }
  }
};

}  // namespace

const ScalarKernels scalar_kernels = {ScalarCodeKernels<Sixteen>::scan, &ScalarLookupKernels<Sixteen>::table};

}  // namespace fastembed::search::avx512vnni
