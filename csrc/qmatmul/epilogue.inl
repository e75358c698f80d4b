// The epilogues of one level, written once over its vector type. A file *_<level>.cpp includes this inside its own
// anonymous namespace after defining Vec, Index and, on them:
//   broadcast(f), sub, mul, divide, multiply_add(a, b, c) = a * b + c, absolute
//   smaller(a, b), larger(a, b)   b where either is NaN
//   truncate(v) -> Index, widen(Index) -> Vec
//   power_of_two(Index)           2^i for -127 < i < 128
//   look_up(table, Index)         of gate_segments entries

inline __attribute__((always_inline)) Vec rectify(Vec x) { return larger(broadcast(0.f), x); }

inline __attribute__((always_inline)) Vec gated(Vec x, const float* gate) {
  const Vec position = smaller(mul(absolute(x), broadcast(gate_segments_per_unit)), broadcast(gate_segments - 1));
  const Index segment = truncate(position);
  const Vec offset = sub(position, widen(segment));
  Vec value = look_up(gate + (gate_coefficients - 1) * gate_segments, segment);
  for (int k = gate_coefficients - 2; k >= 0; --k) {
    value = multiply_add(value, offset, look_up(gate + k * gate_segments, segment));
  }
  return sub(rectify(x), value);
}

// max(x, 0) - |x| / (1 + e^|x|), the quotient taken as |x| e^-|x| / (1 + e^-|x|). Beyond 87 it counts as at 87:
// nothing.
inline __attribute__((always_inline)) Vec sigmoid_weighted(Vec x) {
  const Vec magnitude = smaller(absolute(x), broadcast(87.f));
  // e^-m = 2^-n e^r with r = n ln 2 - m in [-ln 2 / 2, ln 2 / 2], ln 2 in two parts of which the first is short.
  const Index n = truncate(multiply_add(magnitude, broadcast(1.44269504f), broadcast(0.5f)));
  const Vec high = multiply_add(widen(n), broadcast(0.693359375f), sub(broadcast(0.f), magnitude));
  const Vec r = multiply_add(widen(n), broadcast(-2.12194440e-4f), high);
  constexpr float factorials[] = {1.f, 1.f, 2.f, 6.f, 24.f, 120.f, 720.f};
  Vec power = broadcast(1.f / 5040);
  for (int k = 6; k >= 0; --k) power = multiply_add(power, r, broadcast(1.f / factorials[k]));
  const Vec decay = divide(power, power_of_two(n));
  return sub(rectify(x), divide(mul(magnitude, decay), sub(decay, broadcast(-1.f))));
}

// `gate`: the table of `gate_table`; either GELU stands for both, which differ in that only.
template <Epilogue epilogue>
inline __attribute__((always_inline)) Vec apply_epilogue(Vec x, const float* gate) {
  if constexpr (epilogue == Epilogue::none) return x;
  if constexpr (epilogue == Epilogue::relu) return rectify(x);
  if constexpr (epilogue == Epilogue::silu) return sigmoid_weighted(x);
  return gated(x, gate);
}

inline __attribute__((always_inline)) Vec apply_epilogue(Vec x, const Output& output) {
  switch (output.epilogue) {
    case Epilogue::none:
      return x;
    case Epilogue::relu:
      return apply_epilogue<Epilogue::relu>(x, output.gate);
    case Epilogue::silu:
      return apply_epilogue<Epilogue::silu>(x, output.gate);
    default:
      return apply_epilogue<Epilogue::gelu>(x, output.gate);
  }
}
