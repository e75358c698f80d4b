// The kernels of one level, written once over its vector type. A file *_<level>.cpp includes this inside its own
// anonymous namespace after defining, for W = Vec::width lanes of float:
//   Vec                           a vector of W floats
//   load(p), load(p, n)           W, or the first n < W and zeros, of f32, bf16 or f16, widened to float
//   store(p, v), store(p, v, n)   the same way back, rounded to nearest, ties to even
//   store_i8(p, v), store_i8(p, v, n)   to int8, rounded likewise, for magnitudes up to 127
//   can_stream(p)                 whether p is aligned for stream(p, v), a store past the caches
//   settle()                      makes what was streamed visible like any other store
//   broadcast, add, sub, mul, div, magnitude
//   multiply_add(a, b, c)         a * b + c
//   max_or_nan(a, b)              NaN if either is
//   zero_if_nan(v)
//   positive(v)                   bit i is set where lane i is above 0
//   broadcast_bits(i)             lanes of the bits of an int32
//   beats(a, i, b, j)             lanes where a is larger than b, NaN being largest, or as large with i < j, as int32
//   bits select(lanes, a, b)           a in those lanes, b in the others, bits untouched Products add(a, b) sums
//   products in double lanes; total() adds the lanes up in a fixed order
// Every column is computed by the same operations wherever it falls in a vector, so how the columns are split between
// threads never shows in a result.

// Tokens are taken in groups. A group's tokens are added one after the other, then the group to the running sum.
constexpr int64_t group = 8;

// From this many tokens on a group's are taken from eighths of the sequence: eight streams that each read memory in
// order, which is what hardware prefetching follows best (a tenth faster, measured on Zen 4). Shorter sequences would
// have too short eighths.
constexpr int64_t many_tokens = 128;

// Bytes from what is being read to what is asked of the memory meanwhile, all streams together, because hardware
// prefetching stops at the end of every page. Measured on Zen 4 with 4 KB pages: 8 KB to 64 KB serve, and the
// second-level cache is the place to put it.
constexpr int64_t bytes_ahead = 32 << 10;

// Which of a sequence's `count` tokens stand in which full group; those left over follow. It depends on nothing else,
// so that neither does any sum.
struct Grouping {
  int64_t groups;
  int64_t advance;  // from the first token of a group to that of the next
  int64_t step;     // from one token of a group to the next

  explicit Grouping(int64_t count) : groups(count / group), advance(group), step(1) {
    if (count >= many_tokens) {
      advance = 1;
      step = groups;
    }
  }

  int64_t member(int64_t g, int64_t k) const { return g * advance + k * step; }
};

// Calls body(column, lanes) over `columns` columns: whole vectors, then the rest.
template <class Body>
inline __attribute__((always_inline)) void for_columns(int64_t columns, const Body& body) {
  int64_t c = 0;
#pragma GCC unroll 4
  for (; c + Vec::width <= columns; c += Vec::width) body(c, Vec::width);
  if (c < columns) body(c, columns - c);
}

// Where the tokens of one full group after the other stand.
template <class T>
class Walk {
 public:
  const T* at[group];
  int64_t index[group];

  Walk(const Tokens& tokens, int64_t first_column)
      : tokens_(tokens),
        first_column_(first_column),
        grouping_(tokens.count),
        contiguous_(tokens.count > 0 && tokens.index[tokens.count - 1] - tokens.index[0] == tokens.count - 1) {}

  int64_t groups() const { return grouping_.groups; }

  // Groups are mostly asked for in order, and of sequences without holes, where looking up eight tokens would take a
  // good part of the time of adding them.
  inline __attribute__((always_inline)) void go_to(int64_t g) {
    if (contiguous_ && g == current_ + 1) {
      const int64_t elements = grouping_.advance * tokens_.stride;
      for (int64_t k = 0; k < group; ++k) at[k] += elements;
      for (int64_t k = 0; k < group; ++k) index[k] += grouping_.advance;
    } else {
      for (int64_t k = 0; k < group; ++k) put(k, grouping_.member(g, k));
    }
    current_ = g;
  }

  // The tokens that fill no group, from the first place on. Returns how many.
  int64_t go_to_rest() {
    const int64_t rest = tokens_.count % group;
    for (int64_t k = 0; k < group; ++k) put(k, k < rest ? tokens_.count - rest + k : tokens_.count - 1);
    return rest;
  }

 private:
  void put(int64_t k, int64_t number) {
    index[k] = tokens_.index[number];
    at[k] = static_cast<const T*>(tokens_.data) + index[k] * tokens_.stride + first_column_;
  }

  const Tokens& tokens_;
  const int64_t first_column_;
  const Grouping grouping_;
  const bool contiguous_;
  int64_t current_ = -2;
};

// The tokens of one group, and those to ask for meanwhile.
template <class T>
struct Group {
  const T* const* at;
  const int64_t* index;
  const T* const* soon;  // null where someone else asks

  // Asks for `vectors` vectors of token k.
  template <int vectors>
  inline __attribute__((always_inline)) void prefetch(int64_t k, int64_t column) const {
    if (soon == nullptr) return;
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t c = 0; c < vectors * Vec::width; c += line) __builtin_prefetch(soon[k] + column + c, 0, 2);
  }
};

// Calls body(members, size) for every group; `size` is a constant wherever a group is full.
template <class T, class Body>
inline __attribute__((always_inline)) void for_groups(const Tokens& tokens, const Tokens& next, int64_t first_column,
                                                      int64_t columns, const Body& body) {
  Walk<T> now(tokens, first_column), soon(tokens, first_column), soon_in_next(next, first_column);
  const int64_t ahead = bytes_ahead / (group * columns * static_cast<int64_t>(sizeof(T))) + 1;
  for (int64_t g = 0; g < now.groups(); ++g) {
    now.go_to(g);
    const T* const* to_prefetch = now.at;
    if (g + ahead < now.groups()) {
      soon.go_to(g + ahead);
      to_prefetch = soon.at;
    } else if (g + ahead - now.groups() < soon_in_next.groups()) {
      soon_in_next.go_to(g + ahead - now.groups());
      to_prefetch = soon_in_next.at;
    }
    body(Group<T>{now.at, now.index, to_prefetch}, group);
  }
  const int64_t rest = now.go_to_rest();
  if (rest > 0) body(Group<T>{now.at, now.index, now.at}, rest);
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

inline void fill(float* values, int64_t columns, float value) {
  for_columns(columns, [&](int64_t c, int64_t lanes) { store_lanes(values + c, broadcast(value), lanes); });
}

struct Plain {
  static inline __attribute__((always_inline)) Vec add_to(Vec sum, Vec value, float) { return add(sum, value); }
};

struct Weighted {
  static inline __attribute__((always_inline)) Vec add_to(Vec sum, Vec value, float weight) {
    return multiply_add(value, broadcast(weight), sum);
  }
};

// Vectors taken together by the loops below: a cache line at least, of every token of the group, so that the addresses
// of the tokens, too many for the registers, are fetched once for all of them.
constexpr int together = 32 / Vec::width;

// Calls step.run<vectors>(column, lanes) over `columns` columns: `together` vectors at a time, then one, then the rest.
template <class Step>
inline __attribute__((always_inline)) void for_many_columns(int64_t columns, const Step& step) {
  int64_t c = 0;
  for (; c + together * Vec::width <= columns; c += together * Vec::width) {
    step.template run<together>(c, Vec::width);
  }
  for (; c + Vec::width <= columns; c += Vec::width) step.template run<1>(c, Vec::width);
  if (c < columns) step.template run<1>(c, columns - c);
}

// Adds a group to the running sums and to what their rounding lost (Knuth's two-sum).
template <class T, class Weighting>
struct AddGroup {
  const Group<T>& members;
  const int64_t size;
  float weights[group];
  float* const sums;
  float* const errors;

  template <int vectors>
  inline __attribute__((always_inline)) void run(int64_t c, int64_t lanes) const {
    Vec value[vectors];
    for (Vec& v : value) v = broadcast(0.f);
    for (int64_t k = 0; k < size; ++k) {
      const T* token = members.at[k] + c;
      for (int v = 0; v < vectors; ++v) {
        value[v] = Weighting::add_to(value[v], load_lanes(token + v * Vec::width, lanes), weights[k]);
      }
      members.template prefetch<vectors>(k, c);
    }
    for (int v = 0; v < vectors; ++v) {
      float* const sum = sums + c + v * Vec::width;
      float* const error = errors + c + v * Vec::width;
      const Vec before = load_lanes(sum, lanes);
      const Vec after = add(before, value[v]);
      const Vec added = sub(after, before);
      const Vec lost = add(sub(before, sub(after, added)), sub(value[v], added));
      store_lanes(sum, after, lanes);
      store_lanes(error, add(load_lanes(error, lanes), lost), lanes);
    }
  }
};

// Sums whose accuracy does not depend on the number of tokens.
template <class T, class Weighting>
class Sums {
 public:
  Sums(const Tokens& tokens, int64_t columns, float* sums)
      : first_token_(tokens.index[0]), columns_(columns), sums_(sums) {
    fill(sums_, columns, 0.f);
    fill(errors_, columns, 0.f);
  }

  inline __attribute__((always_inline)) AddGroup<T, Weighting> adding(const Group<T>& members, int64_t size) {
    AddGroup<T, Weighting> step = {members, size, {}, sums_, errors_};
    for (int64_t k = 0; k < size; ++k) step.weights[k] = static_cast<float>(members.index[k] - first_token_ + 1);
    return step;
  }

  void finish(float divisor) const {
    const Vec by = broadcast(divisor);
    for_columns(columns_, [&](int64_t c, int64_t lanes) {
      // An infinite or NaN sum has no meaningful error.
      const Vec sum = add(load_lanes(sums_ + c, lanes), zero_if_nan(load_lanes(errors_ + c, lanes)));
      store_lanes(sums_ + c, div(sum, by), lanes);
    });
  }

 private:
  const int64_t first_token_;
  const int64_t columns_;
  float* const sums_;
  alignas(64) float errors_[max_columns];
};

template <class T, class Weighting>
void sum_tokens(const Tokens& tokens, const Tokens& next, int64_t first, int64_t columns, float divisor,
                float* pooled) {
  Sums<T, Weighting> sums(tokens, columns, pooled);
  for_groups<T>(tokens, next, first, columns,
                [&](const Group<T>& members, int64_t size) { for_many_columns(columns, sums.adding(members, size)); });
  sums.finish(divisor);
}

template <class T>
struct MaxGroup {
  const Group<T>& members;
  const int64_t size;
  float* const pooled;

  template <int vectors>
  inline __attribute__((always_inline)) void run(int64_t c, int64_t lanes) const {
    Vec largest[vectors];
    for (int v = 0; v < vectors; ++v) largest[v] = load_lanes(pooled + c + v * Vec::width, lanes);
    for (int64_t k = 0; k < size; ++k) {
      const T* token = members.at[k] + c;
      for (int v = 0; v < vectors; ++v) {
        largest[v] = max_or_nan(largest[v], load_lanes(token + v * Vec::width, lanes));
      }
      members.template prefetch<vectors>(k, c);
    }
    for (int v = 0; v < vectors; ++v) store_lanes(pooled + c + v * Vec::width, largest[v], lanes);
  }
};

template <class T>
void max_tokens(const Tokens& tokens, const Tokens& next, int64_t first, int64_t columns, float, float* pooled) {
  fill(pooled, columns, -__builtin_inff());
  for_groups<T>(tokens, next, first, columns, [&](const Group<T>& members, int64_t size) {
    for_many_columns(columns, MaxGroup<T>{members, size, pooled});
  });
}

// What is wanted of a few columns of a group, one after the other while they are in the first-level cache.
template <class T>
struct SeveralOfGroup {
  const AddGroup<T, Plain> sum;
  const AddGroup<T, Weighted> weighted_sum;
  const MaxGroup<T> max;

  template <int vectors>
  inline __attribute__((always_inline)) void run(int64_t c, int64_t lanes) const {
    if (sum.sums != nullptr) sum.template run<vectors>(c, lanes);
    if (weighted_sum.sums != nullptr) weighted_sum.template run<vectors>(c, lanes);
    if (max.pooled != nullptr) max.template run<vectors>(c, lanes);
  }
};

template <class T>
void reduce_several(const Tokens& tokens, const Tokens& next, int64_t first, int64_t columns, const Several& wanted) {
  Sums<T, Plain> sums(tokens, wanted.sum == nullptr ? 0 : columns, wanted.sum);
  Sums<T, Weighted> weighted_sums(tokens, wanted.weighted_sum == nullptr ? 0 : columns, wanted.weighted_sum);
  fill(wanted.max, wanted.max == nullptr ? 0 : columns, -__builtin_inff());
  for_groups<T>(tokens, next, first, columns, [&](const Group<T>& members, int64_t size) {
    const Group<T> again = {members.at, members.index, nullptr};
    const bool sum = wanted.sum != nullptr, weighted = wanted.weighted_sum != nullptr;
    for_many_columns(columns,
                     SeveralOfGroup<T>{sums.adding(members, size), weighted_sums.adding(sum ? again : members, size),
                                       MaxGroup<T>{sum || weighted ? again : members, size, wanted.max}});
  });
  sums.finish(1.f);
  weighted_sums.finish(1.f);
}

// Groups are not in the order of the tokens: of equally large values an earlier one replaces a later.
template <class T>
void max_and_winner_tokens(const Tokens& tokens, int64_t first, int64_t columns, float* pooled, int32_t* winner) {
  float* const winner_bits = reinterpret_cast<float*>(winner);
  fill(pooled, columns, -__builtin_inff());
  for (int64_t c = 0; c < columns; ++c) winner[c] = 0x7fffffff;
  const Tokens none = {nullptr, 0, nullptr, 0};
  for_groups<T>(tokens, none, first, columns, [&](const Group<T>& members, int64_t size) {
    for_columns(columns, [&](int64_t c, int64_t lanes) {
      Vec largest = load_lanes(pooled + c, lanes);
      Vec of = load_lanes(winner_bits + c, lanes);
      for (int64_t k = 0; k < size; ++k) {
        const Vec value = load_lanes(members.at[k] + c, lanes),
                  index = broadcast_bits(static_cast<int32_t>(members.index[k]));
        const auto better = beats(value, index, largest, of);
        largest = select(better, value, largest);
        of = select(better, index, of);
        members.template prefetch<1>(k, c);
      }
      store_lanes(pooled + c, largest, lanes);
      store_lanes(winner_bits + c, of, lanes);
    });
  });
}

constexpr float norm_eps = 1e-12f;

// The norms of the prefixes of one vector, asked for in rising order of dim.
class Norms {
 public:
  explicit Norms(const float* pooled) : pooled_(pooled) {}

  float of(int64_t dim) {
    for (; c_ + Vec::width <= dim; c_ += Vec::width) {
      const Vec v = load(pooled_ + c_);
      squares_.add(v, v);
    }
    Products with_rest = squares_;
    if (c_ < dim) {
      const Vec v = load(pooled_ + c_, dim - c_);
      with_rest.add(v, v);
    }
    return static_cast<float>(__builtin_sqrt(with_rest.total()));
  }

 private:
  const float* pooled_;
  Products squares_;  // of columns [0, c_)
  int64_t c_ = 0;
};

template <class T>
void write_prefixes(const float* pooled, const Prefix* prefixes, int64_t count, int64_t row, bool normalize) {
  Norms norms(pooled);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t dim = prefixes[i].dim;
    float divisor = 1.f;
    if (normalize) {
      divisor = norms.of(dim);
      if (divisor < norm_eps) divisor = norm_eps;
    }
    const Vec by = broadcast(divisor);
    T* out = static_cast<T*>(prefixes[i].data) + row * dim;
    for_columns(dim,
                [&](int64_t k, int64_t lanes) { store_lanes(out + k, div(load_lanes(pooled + k, lanes), by), lanes); });
  }
}

// The largest magnitude of a vector; infinity if one is infinite or NaN.
inline float largest_magnitude(const float* values, int64_t columns) {
  Vec largest = broadcast(0.f);
  for_columns(columns, [&](int64_t c, int64_t lanes) {
    largest = max_or_nan(largest, magnitude(load_lanes(values + c, lanes)));
  });
  float lane[Vec::width];
  store(lane, largest);
  float result = 0.f;
  for (float value : lane) {
    if (!(value <= __FLT_MAX__)) return __builtin_inff();
    if (value > result) result = value;
  }
  return result;
}

// 127 over the largest magnitude, zeros where that is zero or not finite.
void write_i8(const float* pooled, const Prefix* prefixes, int64_t count, int64_t row, bool) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t dim = prefixes[i].dim;
    int8_t* out = static_cast<int8_t*>(prefixes[i].data) + row * dim;
    const float largest = largest_magnitude(pooled, dim);
    if (largest == 0.f || largest > __FLT_MAX__) {
      for (int64_t c = 0; c < dim; ++c) out[c] = 0;
      continue;
    }
    const Vec by = broadcast(largest), scale = broadcast(127.f);
    for_columns(dim, [&](int64_t c, int64_t lanes) {
      const Vec code = mul(div(load_lanes(pooled + c, lanes), by), scale);
      if (lanes == Vec::width) {
        store_i8(out + c, code);
      } else {
        store_i8(out + c, code, lanes);
      }
    });
  }
}

inline uint8_t reverse_bits(uint8_t byte) {
  byte = static_cast<uint8_t>(byte >> 4 | byte << 4);
  byte = static_cast<uint8_t>((byte >> 2 & 0x33) | (byte & 0x33) << 2);
  return static_cast<uint8_t>((byte >> 1 & 0x55) | (byte & 0x55) << 1);
}

// One bit per column, set where it is above zero; the first column in the highest bit of the first byte.
void write_bits(const float* pooled, const Prefix* prefixes, int64_t count, int64_t row, bool) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t dim = prefixes[i].dim;
    uint8_t* out = static_cast<uint8_t*>(prefixes[i].data) + row * ((dim + 7) / 8);
    uint32_t pending = 0;
    for_columns(dim, [&](int64_t c, int64_t lanes) {
      pending |= positive(load_lanes(pooled + c, lanes)) << c % 8;
      for (int64_t done = c + lanes; done / 8 > c / 8; c += 8, pending >>= 8) {
        *out++ = reverse_bits(static_cast<uint8_t>(pending));
      }
    });
    if (dim % 8 != 0) *out = reverse_bits(static_cast<uint8_t>(pending));
  }
}

template <class T>
void backward_of_prefixes(const float* pooled, const Prefix* grads, int64_t count, int64_t row, bool normalize,
                          float divisor, int64_t columns, float* grad) {
  fill(grad, columns, 0.f);
  Norms norms(pooled);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t dim = grads[i].dim;
    const T* of_prefix = static_cast<const T*>(grads[i].data) + row * dim;
    if (!normalize) {
      for_columns(dim, [&](int64_t c, int64_t lanes) {
        store_lanes(grad + c, add(load_lanes(grad + c, lanes), load_lanes(of_prefix + c, lanes)), lanes);
      });
      continue;
    }
    // With u = p / |p|: (g - u (u . g)) / |p|, and g / eps where the norm was too small to divide by.
    const float norm = norms.of(dim);
    const bool is_tiny = norm <= norm_eps;
    const Vec by = broadcast(norm < norm_eps ? norm_eps : norm);
    Products along;
    for_columns(dim, [&](int64_t c, int64_t lanes) {
      along.add(div(load_lanes(pooled + c, lanes), by), load_lanes(of_prefix + c, lanes));
    });
    const Vec length = broadcast(is_tiny ? 0.f : static_cast<float>(along.total()));
    for_columns(dim, [&](int64_t c, int64_t lanes) {
      const Vec unit = div(load_lanes(pooled + c, lanes), by);
      const Vec across = sub(load_lanes(of_prefix + c, lanes), mul(unit, length));
      store_lanes(grad + c, add(load_lanes(grad + c, lanes), div(across, by)), lanes);
    });
  }
  const Vec by = broadcast(divisor);
  for_columns(columns,
              [&](int64_t c, int64_t lanes) { store_lanes(grad + c, div(load_lanes(grad + c, lanes), by), lanes); });
}

template <class T>
inline __attribute__((always_inline)) void put(T* to, Vec value, bool past_caches) {
  if (past_caches) {
    stream(to, value);
  } else {
    store(to, value);
  }
}

template <class T>
void backward_of_token(const float* grad, float weight, int64_t columns, int64_t size, bool streamed, void* token) {
  T* out = static_cast<T*>(token);
  const Vec by = broadcast(weight), zero = broadcast(0.f);
  const bool past_caches = streamed && can_stream(out);
  int64_t c = 0;
  for (; c + Vec::width <= columns; c += Vec::width) put(out + c, mul(load(grad + c), by), past_caches);
  if (c < columns) {
    store(out + c, mul(load(grad + c, columns - c), by), columns - c);
    c = columns;
  }
  for (; c < size && c % Vec::width != 0; ++c) store(out + c, zero, 1);
  for (; c + Vec::width <= size; c += Vec::width) put(out + c, zero, past_caches);
  if (c < size) store(out + c, zero, size - c);
}

constexpr Kernels table = {
    {sum_tokens<f32, Plain>, sum_tokens<bf16, Plain>, sum_tokens<f16, Plain>},
    {sum_tokens<f32, Weighted>, sum_tokens<bf16, Weighted>, sum_tokens<f16, Weighted>},
    {max_tokens<f32>, max_tokens<bf16>, max_tokens<f16>},
    {reduce_several<f32>, reduce_several<bf16>, reduce_several<f16>},
    {max_and_winner_tokens<f32>, max_and_winner_tokens<bf16>, max_and_winner_tokens<f16>},
    {write_prefixes<f32>, write_prefixes<bf16>, write_prefixes<f16>, write_i8, write_bits},
    {backward_of_prefixes<f32>, backward_of_prefixes<bf16>, backward_of_prefixes<f16>},
    {backward_of_token<f32>, backward_of_token<bf16>, backward_of_token<f16>},
    settle,
};
