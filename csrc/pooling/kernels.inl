// The kernels of one level, written once over its vector type. A file *_<level>.cpp includes this inside its own
// anonymous namespace after defining, for W = Vec::width lanes of float:
//   Vec                           a vector of W floats
//   load(p), load(p, n)           W, or the first n < W and zeros, of f32, bf16 or f16, widened to float
//   store(p, v), store(p, v, n)   the same way back, rounded to nearest, ties to even
//   broadcast, add, sub, mul, div
//   multiply_add(a, b, c)         a * b + c
//   max_or_nan(a, b)              NaN if either is
//   zero_if_nan(v)
//   Squares                       add(v) sums squares in double lanes; total() adds the lanes up in a fixed order
// Every column is computed by the same operations wherever it falls in a vector, so how the columns are split between
// threads never shows in a result.

constexpr int64_t group = 8;  // tokens read per pass over the accumulators

template <class T>
struct Rows {
  const T* at[group];

  Rows(const Tokens& tokens, int64_t first_token, int64_t count, int64_t first_column) {
    const T* data = static_cast<const T*>(tokens.data) + first_column;
    for (int64_t i = 0; i < count; ++i) at[i] = data + tokens.index[first_token + i] * tokens.stride;
  }
};

// Calls body(column, lanes) over `columns` columns: whole vectors, then the rest.
template <class Body>
inline __attribute__((always_inline)) void for_columns(int64_t columns, const Body& body) {
  int64_t c = 0;
  for (; c + Vec::width <= columns; c += Vec::width) body(c, Vec::width);
  if (c < columns) body(c, columns - c);
}

template <class T>
inline __attribute__((always_inline)) Vec load_lanes(const T* from, int64_t lanes) {
  return lanes == Vec::width ? load(from) : load(from, lanes);
}

template <class T>
inline __attribute__((always_inline)) void store_lanes(T* to, Vec value, int64_t lanes) {
  if (lanes == Vec::width) {
    store(to, value);
  } else {
    store(to, value, lanes);
  }
}

// A running sum whose rounding errors are kept beside it (Knuth's two-sum), so that its accuracy does not depend on
// the number of tokens.
struct Accumulators {
  alignas(64) float sum[max_columns];
  alignas(64) float error[max_columns];

  inline __attribute__((always_inline)) void add_at(int64_t c, Vec value) {
    const Vec before = load(sum + c);
    const Vec after = add(before, value);
    const Vec added = sub(after, before);
    const Vec lost = add(sub(before, sub(after, added)), sub(value, added));
    store(sum + c, after);
    store(error + c, add(load(error + c), lost));
  }
};

struct Plain {
  static inline __attribute__((always_inline)) Vec apply(Vec value, float) { return value; }
  static inline __attribute__((always_inline)) Vec apply_add(Vec value, float, Vec to) { return add(value, to); }
};

struct Weighted {
  static inline __attribute__((always_inline)) Vec apply(Vec value, float weight) {
    return mul(value, broadcast(weight));
  }
  static inline __attribute__((always_inline)) Vec apply_add(Vec value, float weight, Vec to) {
    return multiply_add(value, broadcast(weight), to);
  }
};

template <class T, class Weighting>
void sum_tokens(const Tokens& tokens, int64_t first, int64_t columns, float divisor, float* pooled) {
  Accumulators acc;
  for (int64_t c = 0; c < columns; c += Vec::width) {
    store(acc.sum + c, broadcast(0.f));
    store(acc.error + c, broadcast(0.f));
  }
  const auto weight = [&](int64_t i) { return static_cast<float>(tokens.index[i] - tokens.index[0] + 1); };
  int64_t i = 0;
  for (; i + group <= tokens.count; i += group) {
    const Rows<T> rows(tokens, i, group, first);
    float w[group];
    for (int64_t k = 0; k < group; ++k) w[k] = weight(i + k);
    for_columns(columns, [&](int64_t c, int64_t lanes) {
      const auto pair = [&](int64_t k) {
        return Weighting::apply_add(load_lanes(rows.at[k + 1] + c, lanes), w[k + 1],
                                    Weighting::apply(load_lanes(rows.at[k] + c, lanes), w[k]));
      };
      acc.add_at(c, add(add(pair(0), pair(2)), add(pair(4), pair(6))));
    });
  }
  for (; i < tokens.count; ++i) {
    const Rows<T> rows(tokens, i, 1, first);
    const float w = weight(i);
    for_columns(columns, [&](int64_t c, int64_t lanes) {
      acc.add_at(c, Weighting::apply(load_lanes(rows.at[0] + c, lanes), w));
    });
  }
  const Vec by = broadcast(divisor);
  for_columns(columns, [&](int64_t c, int64_t lanes) {
    // An infinite or NaN sum has no meaningful error.
    store_lanes(pooled + c, div(add(load(acc.sum + c), zero_if_nan(load(acc.error + c))), by), lanes);
  });
}

template <class T>
void max_tokens(const Tokens& tokens, int64_t first, int64_t columns, float, float* pooled) {
  const Rows<T> start(tokens, 0, 1, first);
  for_columns(columns,
              [&](int64_t c, int64_t lanes) { store_lanes(pooled + c, load_lanes(start.at[0] + c, lanes), lanes); });
  int64_t i = 1;
  for (; i + group <= tokens.count; i += group) {
    const Rows<T> rows(tokens, i, group, first);
    for_columns(columns, [&](int64_t c, int64_t lanes) {
      const auto pair = [&](int64_t k) {
        return max_or_nan(load_lanes(rows.at[k] + c, lanes), load_lanes(rows.at[k + 1] + c, lanes));
      };
      const Vec largest = max_or_nan(max_or_nan(pair(0), pair(2)), max_or_nan(pair(4), pair(6)));
      store_lanes(pooled + c, max_or_nan(load_lanes(pooled + c, lanes), largest), lanes);
    });
  }
  for (; i < tokens.count; ++i) {
    const Rows<T> rows(tokens, i, 1, first);
    for_columns(columns, [&](int64_t c, int64_t lanes) {
      const Vec largest = max_or_nan(load_lanes(pooled + c, lanes), load_lanes(rows.at[0] + c, lanes));
      store_lanes(pooled + c, largest, lanes);
    });
  }
}

template <class T>
void write_prefixes(const float* pooled, const Prefix* prefixes, int64_t count, int64_t row, bool normalize) {
  constexpr float norm_eps = 1e-12f;
  Squares squares;  // of columns [0, c)
  int64_t c = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t dim = prefixes[i].dim;
    float divisor = 1.f;
    if (normalize) {
      for (; c + Vec::width <= dim; c += Vec::width) squares.add(load(pooled + c));
      Squares with_rest = squares;
      if (c < dim) with_rest.add(load(pooled + c, dim - c));
      divisor = static_cast<float>(__builtin_sqrt(with_rest.total()));
      if (divisor < norm_eps) divisor = norm_eps;
    }
    const Vec by = broadcast(divisor);
    T* out = static_cast<T*>(prefixes[i].data) + row * dim;
    for_columns(dim,
                [&](int64_t k, int64_t lanes) { store_lanes(out + k, div(load_lanes(pooled + k, lanes), by), lanes); });
  }
}

constexpr Kernels table = {
    {sum_tokens<f32, Plain>, sum_tokens<bf16, Plain>, sum_tokens<f16, Plain>},
    {sum_tokens<f32, Weighted>, sum_tokens<bf16, Weighted>, sum_tokens<f16, Weighted>},
    {max_tokens<f32>, max_tokens<bf16>, max_tokens<f16>},
    {write_prefixes<f32>, write_prefixes<bf16>, write_prefixes<f16>},
};
