#include <immintrin.h>

#include "pooling/kernels.hpp"

namespace fastembed::pooling::avx2 {
namespace {

struct Vec {
  static constexpr int64_t width = 8;
  __m256 lanes;
};

inline __m256i first_lanes(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
}

// There are no masked loads and stores of 16 bits.
template <class T>
inline __m128i load_halves(const T* p, int64_t n) {
  uint16_t bits[8] = {};
  __builtin_memcpy(bits, p, static_cast<uint64_t>(n) * sizeof(T));
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bits));
}
template <class T>
inline void store_halves(T* p, __m128i v, int64_t n) {
  uint16_t bits[8];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bits), v);
  __builtin_memcpy(p, bits, static_cast<uint64_t>(n) * sizeof(T));
}

inline Vec widen_bf16(__m128i bits) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline __m128i narrow_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan);
  const __m256i high = _mm256_srli_epi32(quiet, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

inline Vec load(const f32* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const f32* p, int64_t n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
inline Vec load(const bf16* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load(const bf16* p, int64_t n) { return widen_bf16(load_halves(p, n)); }
inline Vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline Vec load(const f16* p, int64_t n) { return {_mm256_cvtph_ps(load_halves(p, n))}; }

inline void store(f32* p, Vec v) { _mm256_storeu_ps(p, v.lanes); }
inline void store(f32* p, Vec v, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), v.lanes); }
inline void store(bf16* p, Vec v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v.lanes)); }
inline void store(bf16* p, Vec v, int64_t n) { store_halves(p, narrow_bf16(v.lanes), n); }
inline void store(f16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.lanes, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(f16* p, Vec v, int64_t n) { store_halves(p, _mm256_cvtps_ph(v.lanes, _MM_FROUND_TO_NEAREST_INT), n); }

inline __m128i narrow_i8(__m256 v) {
  const __m256i codes = _mm256_cvtps_epi32(v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  return _mm_packs_epi16(words, words);
}
inline void store_i8(int8_t* p, Vec v) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), narrow_i8(v.lanes)); }
inline void store_i8(int8_t* p, Vec v, int64_t n) {
  int8_t codes[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), narrow_i8(v.lanes));
  __builtin_memcpy(p, codes, static_cast<uint64_t>(n));
}

inline bool can_stream(const void* p) { return reinterpret_cast<uintptr_t>(p) % 32 == 0; }
inline void stream(f32* p, Vec v) { _mm256_stream_ps(p, v.lanes); }
inline void stream(bf16* p, Vec v) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v.lanes)); }
inline void stream(f16* p, Vec v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.lanes, _MM_FROUND_TO_NEAREST_INT));
}
void settle() { _mm_sfence(); }

inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lanes, b.lanes)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lanes, b.lanes)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lanes, b.lanes)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lanes, b.lanes)}; }
inline Vec magnitude(Vec v) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), v.lanes)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }
inline Vec max_or_nan(Vec a, Vec b) {
  // The instruction returns its second operand when either is NaN.
  const __m256 a_is_nan = _mm256_cmp_ps(a.lanes, a.lanes, _CMP_UNORD_Q);
  return {_mm256_blendv_ps(_mm256_max_ps(a.lanes, b.lanes), a.lanes, a_is_nan)};
}
inline Vec zero_if_nan(Vec v) { return {_mm256_and_ps(v.lanes, _mm256_cmp_ps(v.lanes, v.lanes, _CMP_ORD_Q))}; }

inline unsigned positive(Vec v) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(v.lanes, _mm256_setzero_ps(), _CMP_GT_OQ)));
}
inline Vec broadcast_bits(int32_t i) { return {_mm256_castsi256_ps(_mm256_set1_epi32(i))}; }
inline __m256 beats(Vec a, Vec i, Vec b, Vec j) {
  const __m256 a_is_nan = _mm256_cmp_ps(a.lanes, a.lanes, _CMP_UNORD_Q);
  const __m256 b_is_nan = _mm256_cmp_ps(b.lanes, b.lanes, _CMP_UNORD_Q);
  const __m256 larger = _mm256_or_ps(_mm256_cmp_ps(a.lanes, b.lanes, _CMP_GT_OQ), _mm256_andnot_ps(b_is_nan, a_is_nan));
  const __m256 as_large = _mm256_or_ps(_mm256_cmp_ps(a.lanes, b.lanes, _CMP_EQ_OQ), _mm256_and_ps(a_is_nan, b_is_nan));
  const __m256i earlier = _mm256_cmpgt_epi32(_mm256_castps_si256(j.lanes), _mm256_castps_si256(i.lanes));
  return _mm256_or_ps(larger, _mm256_and_ps(as_large, _mm256_castsi256_ps(earlier)));
}
inline Vec select(__m256 lanes, Vec a, Vec b) { return {_mm256_blendv_ps(b.lanes, a.lanes, lanes)}; }

struct Products {
  __m256d low = _mm256_setzero_pd();
  __m256d high = _mm256_setzero_pd();

  static __m256d first_half(Vec v) { return _mm256_cvtps_pd(_mm256_castps256_ps128(v.lanes)); }
  static __m256d second_half(Vec v) { return _mm256_cvtps_pd(_mm256_extractf128_ps(v.lanes, 1)); }

  void add(Vec a, Vec b) {
    low = _mm256_fmadd_pd(first_half(a), first_half(b), low);
    high = _mm256_fmadd_pd(second_half(a), second_half(b), high);
  }
  double total() const {
    double lane[4];
    _mm256_storeu_pd(lane, _mm256_add_pd(low, high));
    return (lane[0] + lane[1]) + (lane[2] + lane[3]);
  }
};

#include "pooling/kernels.inl"

}  // namespace

const Kernels& kernels() { return table; }

}  // namespace fastembed::pooling::avx2
