// Any CPU: four lanes in the compiler's portable vectors (SSE2 on x86-64, NEON on Arm).
#include "pooling/kernels.hpp"

namespace fastembed::pooling::generic {
namespace {

using Floats = float __attribute__((vector_size(16)));
using Bits = uint32_t __attribute__((vector_size(16)));

struct Vec {
  static constexpr int64_t width = 4;
  Floats lanes;
};

template <class To, class From>
inline To cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast keeps the bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
inline Bits load_halves(const T* p, int64_t n) {
  Bits bits = {};
  for (int64_t i = 0; i < n; ++i) bits[i] = p[i].bits;
  return bits;
}
template <class T>
inline void store_halves(T* p, Bits bits, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i].bits = static_cast<uint16_t>(bits[i]);
}

inline Bits if_nan(Floats v, Bits then, Bits otherwise) { return v != v ? then : otherwise; }

inline Vec widen(Bits bits, bf16) { return {cast<Floats>(bits << 16)}; }
inline Bits narrow(Floats v, bf16) {
  const Bits bits = cast<Bits>(v);
  return if_nan(v, Bits{} + 0x7fc0, (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Vec widen(Bits bits, f16) {
  // Moved up to float's place the exponent is 112 too small; scaling mends it, and normalises what was subnormal.
  const Floats scaled = cast<Floats>((bits & 0x7fff) << 13) * 0x1p112f;
  const Bits special = scaled >= 0x1p16f ? Bits{} + 0x7f800000 : Bits{};
  return {cast<Floats>(cast<Bits>(scaled) | special | (bits & 0x8000) << 16)};
}
inline Bits narrow(Floats v, f16) {
  const Bits bits = cast<Bits>(v);
  const Bits sign = (bits >> 16) & 0x8000;
  const Bits magnitude = bits & 0x7fffffff;
  // Normal results: drop 13 bits, rounding. Subnormal ones: adding 1/2 leaves them, rounded, in the low bits.
  const Bits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Bits subnormal = cast<Bits>(cast<Floats>(magnitude) + 0.5f) - 0x3f000000;
  const Bits finite = magnitude < (113u << 23) ? subnormal : normal;
  const Bits bounded = magnitude >= 0x477ff000 ? Bits{} + 0x7c00 : finite;  // 65520 and above round to infinity
  return sign | if_nan(v, Bits{} + 0x7e00, bounded);
}

inline Vec load(const f32* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline Vec load(const f32* p, int64_t n) {
  Vec v = {};
  for (int64_t i = 0; i < n; ++i) v.lanes[i] = p[i];
  return v;
}
template <class T>
inline Vec load(const T* p, int64_t n = Vec::width) {
  return widen(load_halves(p, n), T{});
}

inline void store(f32* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
inline void store(f32* p, Vec v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v.lanes[i];
}
template <class T>
inline void store(T* p, Vec v, int64_t n = Vec::width) {
  store_halves(p, narrow(v.lanes, T{}), n);
}

inline void store_i8(int8_t* p, Vec v, int64_t n = Vec::width) {
  constexpr float to_integer = 0x1.8p23f;  // so large that adding it leaves no fraction
  const Floats codes = (v.lanes + to_integer) - to_integer;
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<int8_t>(codes[i]);
}

// No stores past the caches that every CPU has.
inline bool can_stream(const void*) { return false; }
template <class T>
inline void stream(T* p, Vec v) {
  store(p, v);
}
void settle() {}

inline Vec broadcast(float x) { return {Floats{} + x}; }
inline Vec add(Vec a, Vec b) { return {a.lanes + b.lanes}; }
inline Vec sub(Vec a, Vec b) { return {a.lanes - b.lanes}; }
inline Vec mul(Vec a, Vec b) { return {a.lanes * b.lanes}; }
inline Vec div(Vec a, Vec b) { return {a.lanes / b.lanes}; }
inline Vec magnitude(Vec v) { return {cast<Floats>(cast<Bits>(v.lanes) & 0x7fffffff)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {a.lanes * b.lanes + c.lanes}; }
inline Vec max_or_nan(Vec a, Vec b) {
  const Floats largest = a.lanes > b.lanes ? a.lanes : b.lanes;  // b when either is NaN
  return {a.lanes != a.lanes ? a.lanes : largest};
}
inline Vec zero_if_nan(Vec v) { return {v.lanes != v.lanes ? Floats{} : v.lanes}; }

inline unsigned positive(Vec v) {
  unsigned bits = 0;
  for (int64_t i = 0; i < Vec::width; ++i) bits |= static_cast<unsigned>(v.lanes[i] > 0.f) << i;
  return bits;
}
inline Vec broadcast_bits(int32_t i) { return {cast<Floats>(Bits{} + static_cast<uint32_t>(i))}; }
inline Bits beats(Vec a, Vec i, Vec b, Vec j) {
  const auto a_is_nan = a.lanes != a.lanes, b_is_nan = b.lanes != b.lanes;
  const auto larger = (a.lanes > b.lanes) | (a_is_nan & ~b_is_nan);
  const auto as_large = (a.lanes == b.lanes) | (a_is_nan & b_is_nan);
  return cast<Bits>(larger | (as_large & (cast<Bits>(i.lanes) < cast<Bits>(j.lanes))));
}
inline Vec select(Bits lanes, Vec a, Vec b) {
  return {cast<Floats>((cast<Bits>(a.lanes) & lanes) | (cast<Bits>(b.lanes) & ~lanes))};
}

struct Products {
  double lane[Vec::width] = {};

  void add(Vec a, Vec b) {
    for (int64_t i = 0; i < Vec::width; ++i) lane[i] += static_cast<double>(a.lanes[i]) * b.lanes[i];
  }
  double total() const { return (lane[0] + lane[1]) + (lane[2] + lane[3]); }
};

#include "pooling/kernels.inl"

}  // namespace

const Kernels& kernels() { return table; }

}  // namespace fastembed::pooling::generic
