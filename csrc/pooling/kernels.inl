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

// Tokens are taken in groups. A group's tokens are added one after the other, then the group to the running sum.
constexpr int64_t group = 8;

// The tokens of one group.
template <class T>
struct Group {
  const T* at[group];
  int64_t size;

  Group(const Tokens& tokens, int64_t begin, int64_t first_column) {
    const T* data = static_cast<const T*>(tokens.data) + first_column;
    size = tokens.count - begin < group ? tokens.count - begin : group;
    for (int64_t i = 0; i < size; ++i) at[i] = data + tokens.index[begin + i] * tokens.stride;
  }
};

// Memory delivers most when it is read in order, token by token. Where that is impossible because only some columns are
// wanted, the gaps defeat the hardware's prefetching, and reading the tokens of a group side by side is faster.
inline bool read_in_order(const Tokens& tokens, int64_t columns) { return tokens.stride == columns; }

// Calls body(column, lanes) over `columns` columns: whole vectors, then the rest.
template <class Body>
inline __attribute__((always_inline)) void for_columns(int64_t columns, const Body& body) {
  int64_t c = 0;
#pragma GCC unroll 4
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

template <class T>
inline __attribute__((always_inline)) void prefetch_next_group(const Tokens& tokens, const T* column) {
  __builtin_prefetch(column + group * tokens.stride);
}

// Hardware prefetching stops at the end of a page and has to start anew on the next one. Asking early for the first
// lines of each page keeps the stream going: up to a quarter faster, measured on Zen 4.
template <class T>
inline __attribute__((always_inline)) void prefetch_page_starts(const T* from, int64_t columns) {
  constexpr uintptr_t page = 4096, line = 64, lines = 4, ahead = 2048;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from) + ahead;
  const uintptr_t end = begin + columns * sizeof(T);
  for (uintptr_t start = (begin + page - 1) / page * page; start < end; start += page) {
    for (uintptr_t i = 0; i < lines; ++i) __builtin_prefetch(reinterpret_cast<const void*>(start + i * line));
  }
}

// Running sums of a range of columns, the rounding errors kept beside them (Knuth's two-sum), so that the accuracy does
// not depend on the number of tokens.
template <class T, class Weighting>
class Sums {
 public:
  Sums(const Tokens& tokens, int64_t first, int64_t columns) : tokens_(tokens), first_(first), columns_(columns) {
    for (int64_t c = 0; c < columns; c += Vec::width) {
      store(sum_ + c, broadcast(0.f));
      store(error_ + c, broadcast(0.f));
      store(group_ + c, broadcast(0.f));
    }
    const bool in_order = read_in_order(tokens, columns);
    for (int64_t begin = 0; begin < tokens.count; begin += group) {
      const Group<T> members(tokens, begin, first);
      float weights[group];
      for (int64_t k = 0; k < members.size; ++k) {
        weights[k] = static_cast<float>(tokens.index[begin + k] - tokens.index[0] + 1);
      }
      if (in_order || members.size < group) {
        add_in_order(members, weights);
      } else {
        add_side_by_side(members, weights);
      }
    }
  }

  void divide_into(float divisor, float* pooled) const {
    const Vec by = broadcast(divisor);
    for_columns(columns_, [&](int64_t c, int64_t lanes) {
      // An infinite or NaN sum has no meaningful error.
      store_lanes(pooled + c, div(add(load(sum_ + c), zero_if_nan(load(error_ + c))), by), lanes);
    });
  }

 private:
  void add_in_order(const Group<T>& members, const float* weights) {
    const int64_t last = members.size - 1;
    for (int64_t k = 0; k < last; ++k) {
      prefetch_page_starts(members.at[k], columns_);
      for_columns(columns_, [&](int64_t c, int64_t lanes) {
        const Vec value = load_lanes(members.at[k] + c, lanes);
        store(group_ + c, Weighting::add_to(load(group_ + c), value, weights[k]));
      });
    }
    prefetch_page_starts(members.at[last], columns_);
    for_columns(columns_, [&](int64_t c, int64_t lanes) {
      const Vec value = load_lanes(members.at[last] + c, lanes);
      add_group(c, Weighting::add_to(load(group_ + c), value, weights[last]));
      store(group_ + c, broadcast(0.f));
    });
  }

  void add_side_by_side(const Group<T>& members, const float* weights) {
    for_columns(columns_, [&](int64_t c, int64_t lanes) {
      Vec sum = broadcast(0.f);
      for (int64_t k = 0; k < group; ++k) {
        sum = Weighting::add_to(sum, load_lanes(members.at[k] + c, lanes), weights[k]);
      }
      for (int64_t k = 0; k < group; ++k) prefetch_next_group(tokens_, members.at[k] + c);
      add_group(c, sum);
    });
  }

  inline __attribute__((always_inline)) void add_group(int64_t c, Vec value) {
    const Vec before = load(sum_ + c);
    const Vec after = add(before, value);
    const Vec added = sub(after, before);
    const Vec lost = add(sub(before, sub(after, added)), sub(value, added));
    store(sum_ + c, after);
    store(error_ + c, add(load(error_ + c), lost));
  }

  const Tokens& tokens_;
  const int64_t first_;
  const int64_t columns_;
  alignas(64) float sum_[max_columns];
  alignas(64) float error_[max_columns];
  alignas(64) float group_[max_columns];  // zeros between groups
};

struct Plain {
  static inline __attribute__((always_inline)) Vec add_to(Vec sum, Vec value, float) { return add(sum, value); }
};

struct Weighted {
  static inline __attribute__((always_inline)) Vec add_to(Vec sum, Vec value, float weight) {
    return multiply_add(value, broadcast(weight), sum);
  }
};

template <class T, class Weighting>
void sum_tokens(const Tokens& tokens, int64_t first, int64_t columns, float divisor, float* pooled) {
  Sums<T, Weighting>(tokens, first, columns).divide_into(divisor, pooled);
}

template <class T>
void max_tokens(const Tokens& tokens, int64_t first, int64_t columns, float, float* pooled) {
  const bool in_order = read_in_order(tokens, columns);
  for_columns(columns, [&](int64_t c, int64_t lanes) { store_lanes(pooled + c, broadcast(-__builtin_inff()), lanes); });
  for (int64_t begin = 0; begin < tokens.count; begin += group) {
    const Group<T> members(tokens, begin, first);
    if (in_order || members.size < group) {
      for (int64_t k = 0; k < members.size; ++k) {
        prefetch_page_starts(members.at[k], columns);
        for_columns(columns, [&](int64_t c, int64_t lanes) {
          const Vec value = load_lanes(members.at[k] + c, lanes);
          store_lanes(pooled + c, max_or_nan(load_lanes(pooled + c, lanes), value), lanes);
        });
      }
    } else {
      for_columns(columns, [&](int64_t c, int64_t lanes) {
        Vec largest = load_lanes(pooled + c, lanes);
        for (int64_t k = 0; k < group; ++k) largest = max_or_nan(largest, load_lanes(members.at[k] + c, lanes));
        for (int64_t k = 0; k < group; ++k) prefetch_next_group(tokens, members.at[k] + c);
        store_lanes(pooled + c, largest, lanes);
      });
    }
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
