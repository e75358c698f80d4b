// The epilogues of one level, written once over its vector type. A file *_<level>.cpp includes this inside its own
// anonymous namespace after defining Vec, Index and, on them:
//   broadcast(f), add, sub, mul, multiply_add(a, b, c) = a * b + c, absolute
//   smaller(a, b), larger(a, b)   b where either is NaN
//   truncate(v) -> Index, widen(Index) -> Vec
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

inline __attribute__((always_inline)) Vec apply_epilogue(Vec x, const Output& output) {
  switch (output.epilogue) {
    case Epilogue::none:
      return x;
    case Epilogue::relu:
      return rectify(x);
    default:
      return gated(x, output.gate);
  }
}
