#include <immintrin.h>

#include "pooling/kernels.hpp"

namespace fastembed::pooling::avx512 {
namespace {

struct Vec {
  static constexpr int64_t width = 16;
  __m512 lanes;
};

inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

inline Vec widen_bf16(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline __m256i narrow_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16));
}

inline Vec load(const f32* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const f32* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline Vec load(const bf16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const bf16* p, int64_t n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
inline Vec load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline Vec load(const f16* p, int64_t n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))}; }

inline void store(f32* p, Vec v) { _mm512_storeu_ps(p, v.lanes); }
inline void store(f32* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), v.lanes); }
inline void store(bf16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v.lanes)); }
inline void store(bf16* p, Vec v, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bf16(v.lanes)); }
inline void store(f16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v.lanes, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(f16* p, Vec v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(v.lanes, _MM_FROUND_TO_NEAREST_INT));
}

inline void store_i8(int8_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v.lanes)));
}
inline void store_i8(int8_t* p, Vec v, int64_t n) {
  _mm512_mask_cvtepi32_storeu_epi8(p, first_lanes(n), _mm512_cvtps_epi32(v.lanes));
}

inline bool can_stream(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }
inline void stream(f32* p, Vec v) { _mm512_stream_ps(p, v.lanes); }
inline void stream(bf16* p, Vec v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v.lanes)); }
inline void stream(f16* p, Vec v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v.lanes, _MM_FROUND_TO_NEAREST_INT));
}
void settle() { _mm_sfence(); }

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.lanes, b.lanes)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.lanes, b.lanes)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.lanes, b.lanes)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.lanes, b.lanes)}; }
inline Vec magnitude(Vec v) { return {_mm512_abs_ps(v.lanes)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }
inline Vec max_or_nan(Vec a, Vec b) {
  // The instruction returns its second operand when either is NaN.
  const __mmask16 a_is_nan = _mm512_cmp_ps_mask(a.lanes, a.lanes, _CMP_UNORD_Q);
  return {_mm512_mask_mov_ps(_mm512_max_ps(a.lanes, b.lanes), a_is_nan, a.lanes)};
}
inline Vec zero_if_nan(Vec v) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v.lanes, v.lanes, _CMP_ORD_Q), v.lanes)};
}

inline unsigned positive(Vec v) { return _mm512_cmp_ps_mask(v.lanes, _mm512_setzero_ps(), _CMP_GT_OQ); }
inline Vec broadcast_bits(int32_t i) { return {_mm512_castsi512_ps(_mm512_set1_epi32(i))}; }
inline __mmask16 beats(Vec a, Vec i, Vec b, Vec j) {
  const __mmask16 a_is_nan = _mm512_cmp_ps_mask(a.lanes, a.lanes, _CMP_UNORD_Q);
  const __mmask16 b_is_nan = _mm512_cmp_ps_mask(b.lanes, b.lanes, _CMP_UNORD_Q);
  const __mmask16 larger = _mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_GT_OQ) | (a_is_nan & ~b_is_nan);
  const __mmask16 as_large = _mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_EQ_OQ) | (a_is_nan & b_is_nan);
  const __mmask16 earlier = _mm512_cmplt_epi32_mask(_mm512_castps_si512(i.lanes), _mm512_castps_si512(j.lanes));
  return larger | (as_large & earlier);
}
inline Vec select(__mmask16 lanes, Vec a, Vec b) { return {_mm512_mask_mov_ps(b.lanes, lanes, a.lanes)}; }

struct Products {
  __m512d low = _mm512_setzero_pd();
  __m512d high = _mm512_setzero_pd();

  static __m512d first_half(Vec v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v.lanes)); }
  static __m512d second_half(Vec v) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v.lanes, 1)); }

  void add(Vec a, Vec b) {
    low = _mm512_fmadd_pd(first_half(a), first_half(b), low);
    high = _mm512_fmadd_pd(second_half(a), second_half(b), high);
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
};

#include "pooling/kernels.inl"

}  // namespace

const Kernels& kernels() { return table; }

}  // namespace fastembed::pooling::avx512
