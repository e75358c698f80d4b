// Bit planes of codes as bytes, by GFNI: the transpose of 8 x 8 bits is a product of matrices of bits. Included in the
// anonymous namespace of the level, after dwords_avx512vnni.inl.

// As how many planes a code of so many bits is taken: a power of two.
constexpr int planes_of(int bits) { return bits <= 2 ? bits : bits <= 4 ? 4 : 8; }

// `bits` planes of a code, taken as `planes` of them with zeros for those above, `piece` bytes of each at a time. A
// register then holds a byte for `fields` dimensions, `planes` bits each, the first of them lowest: byte t of word k
// has dimension t of plane bytes k * fields and following.
template <int bits, int planes>
struct Unpack {
  static constexpr int64_t piece = 64 / planes;
  static constexpr int64_t fields = 8 / planes;

  static int64_t dim_of(int64_t word, int64_t field, int64_t byte) { return (word * fields + field) * 8 + byte; }

  // Plane by plane, the most significant one first.
  template <bool whole>
  static inline __attribute__((always_inline)) __m512i load_pieces(const uint8_t* code, int64_t plane_bytes,
                                                                   int64_t left) {
    const __mmask64 mask = whole ? ~__mmask64{0} : first_bytes(left);
    const auto plane_of = [=](int i) { return code + (i - (planes - bits)) * plane_bytes; };
    if constexpr (planes == 1) {
      return load_bytes(code, mask);
    } else if constexpr (planes == 2) {
      const auto plane = [&](int i) {
        return i < planes - bits ? _mm256_setzero_si256()
                                 : _mm256_maskz_loadu_epi8(static_cast<__mmask32>(mask), plane_of(i));
      };
      return _mm512_inserti64x4(_mm512_castsi256_si512(plane(0)), plane(1), 1);
    } else {
      const auto quarter = [&](int i) {
        if constexpr (planes == 4) {
          if (i < planes - bits) return _mm_setzero_si128();
          const uint8_t* const from = plane_of(i);
          return whole ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))
                       : _mm_maskz_loadu_epi8(static_cast<__mmask16>(mask), from);
        } else {
          const auto half = [&](int plane) {
            if (plane < planes - bits) return _mm_setzero_si128();
            const uint8_t* const from = plane_of(plane);
            return whole ? _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))
                         : _mm_maskz_loadu_epi8(static_cast<__mmask16>(mask), from);
          };
          return _mm_unpacklo_epi64(half(2 * i), half(2 * i + 1));
        }
      };
      const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter(0)), quarter(1), 1);
      const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter(2)), quarter(3), 1);
      return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
  }

  // `left` bytes of each plane are left, from `code` in the first one on.
  template <bool whole>
  static inline __attribute__((always_inline)) __m512i bytes(const uint8_t* code, int64_t plane_bytes, int64_t left) {
    const __m512i pieces = load_pieces<whole>(code, plane_bytes, left);
    const __m512i matrices = _mm512_permutexvar_epi8(_mm512_load_si512(rows_of_matrices.bytes), pieces);
    return _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(0x0102040810204080), matrices, 0);
  }

 private:
  struct Bytes {
    alignas(64) uint8_t bytes[64];
  };
  // Row 7 - i of a matrix makes bit i of its bytes.
  static constexpr Bytes make_rows() {
    Bytes rows = {};
    for (int64_t i = 0; i < 64; ++i) {
      const int64_t bit = 7 - i % 8, field = bit / planes, plane = planes - 1 - bit % planes;
      rows.bytes[i] = static_cast<uint8_t>(plane * piece + i / 8 * fields + field);
    }
    return rows;
  }
  static constexpr Bytes rows_of_matrices = make_rows();
};

// Sixteen rows of sixteen 32-bit words become, word by word, the words of all rows.
inline __attribute__((always_inline)) void transpose_dwords(__m512i (&rows)[16]) {
  __m512i halves[2][8];
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 8; ++i) halves[half][i] = rows[8 * half + i];
    transpose(halves[half]);
  }
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int i = 0; i < 8; ++i) {
    rows[2 * i] = _mm512_permutex2var_epi32(halves[0][i], even, halves[1][i]);
    rows[2 * i + 1] = _mm512_permutex2var_epi32(halves[0][i], odd, halves[1][i]);
  }
}

// The sums of the lanes of each of four registers, a lane of each 128 bits for each.
inline __attribute__((always_inline)) __m512i sums_of_quarters(__m512i a, __m512i b, __m512i c, __m512i d) {
  const auto add_pairs = [](__m512i x, __m512i y) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
  };
  const __m512i low = add_pairs(a, b), high = add_pairs(c, d);
  return _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
}

// The sums of the quarters of each of four registers.
inline __attribute__((always_inline)) __m512i add_quarters(const __m512i (&a)[4]) {
  const auto add_pairs = [](__m512i x, __m512i y) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
  };
  return add_pairs(add_pairs(a[0], a[1]), add_pairs(a[2], a[3]));
}

// ---- packed levels: those of 16 plane bytes, with more than 4 bits 8, of 16 codes at a time ----

template <int bits>
void pack_levels_of(const Rows& codes, uint32_t* block) {
  constexpr bool wide = bits > 4;
  using Planes = Unpack<bits, wide ? 8 : 4>;
  constexpr int64_t lanes = Dwords::lanes;
  const int64_t plane_bytes = codes.bytes / bits, words = level_words(plane_bytes);
  for (int64_t row = 0; row < codes.count; row += lanes) {
    __m512i sums = _mm512_setzero_si512();
    for (int64_t done = 0; done < words; done += Planes::piece) {
      const int64_t left = plane_bytes - done;
      const bool whole = left >= Planes::piece;
      const uint8_t* const source = codes.data + row * codes.stride + done;
      __m512i packed[16];
      if (whole && row + lanes <= codes.count) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i) {
          packed[i] = Planes::template bytes<true>(source + i * codes.stride, plane_bytes, left);
        }
      } else {
        for (int64_t i = 0; i < lanes; ++i) {
          packed[i] = row + i >= codes.count ? _mm512_setzero_si512()
                                             : Planes::template bytes<false>(source + i * codes.stride, plane_bytes,
                                                                             whole ? Planes::piece : left);
        }
      }
      transpose_dwords(packed);
      const int64_t some = (words - done < Planes::piece ? words - done : Planes::piece) * (wide ? 2 : 1);
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) {
        if (i >= some) break;
        if (wide) sums = _mm512_dpbusd_epi32(sums, packed[i], _mm512_set1_epi8(1));
        _mm512_storeu_si512(block + i * lanes, packed[i]);
      }
      block += some * lanes;
    }
    if (wide) {
      _mm512_storeu_si512(block, sums);
      block += lanes;
    }
  }
}

void pack_levels(const Rows& codes, int bits, uint32_t* block) {
  constexpr void (*pack[])(const Rows&, uint32_t*) = {
      pack_levels_of<1>, pack_levels_of<2>, pack_levels_of<3>, pack_levels_of<4>,
      pack_levels_of<5>, pack_levels_of<6>, pack_levels_of<7>, pack_levels_of<8>,
  };
  pack[bits - 1](codes, block);
}

// Two packed words come of a word of bytes.
int64_t dim_of_level(int64_t index, bool wide) {
  if (wide) return index;
  const int64_t word = index / 8;
  return Unpack<4, 4>::dim_of(word / 2, index / 4 % 2, word % 2 * 4 + index % 4);
}

// ---- one query against rows as they lie ----

// Sixteen rows at a time, the last ones along with some before them; where there are fewer, the last one again.
template <class Products>
inline __attribute__((always_inline)) void for_sixteen(const Rows& codes, int32_t* sums, const Products& products) {
  constexpr int64_t step = 16;
  const auto take = [&](int64_t row, int64_t last) __attribute__((always_inline)) {
    const auto of = [&](int64_t i) __attribute__((always_inline)) {
      return products(codes.data + (row + i < last ? row + i : last) * codes.stride);
    };
    __m512i quarters[4];
    for (int i = 0; i < 4; ++i) quarters[i] = sums_of_quarters(of(4 * i), of(4 * i + 1), of(4 * i + 2), of(4 * i + 3));
    _mm512_storeu_si512(sums + row, add_quarters(quarters));
  };
  int64_t row = 0;
  for (; row + step <= codes.count; row += step) take(row, INT64_MAX);
  if (row < codes.count) take(codes.count < step ? 0 : codes.count - step, codes.count - 1);
}

// `fixed` registers hold a plane, or with 0 any number. Differences from the query, weighted as in
// popcount_kernels.inl.
template <int bits, int fixed>
void multiply_planes_of(const Rows& codes, const uint8_t* query, int32_t* sums) {
  const int64_t plane_bytes = codes.bytes / bits;
  const int64_t registers = fixed > 0 ? fixed : (plane_bytes + 63) / 64;
  const __mmask64 last = first_bytes(plane_bytes - 64 * (registers - 1));
  const auto load = [=](const uint8_t* code, int64_t i) {
    return load_bytes(code + 64 * i, i + 1 == registers ? last : ~__mmask64{0});
  };
  for_sixteen(codes, sums, [=](const uint8_t* code) __attribute__((always_inline)) {
    __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int64_t i = 0; i < registers; ++i) {
      const __m512i sign = _mm512_xor_si512(load(code, i), load(query, i));
      if constexpr (bits == 1) {
        sum = _mm512_sub_epi32(sum, _mm512_popcnt_epi32(sign));
      } else {
        const uint8_t *const second = code + plane_bytes, *const query_second = query + plane_bytes;
        const __m512i small = _mm512_xor_si512(load(code, i), load(second, i));
        const __m512i query_small = _mm512_xor_si512(load(query, i), load(query_second, i));
        const __m512i ones = _mm512_popcnt_epi8(_mm512_ternarylogic_epi64(sign, small, query_small, 0x78));
        const __m512i threes = _mm512_popcnt_epi8(_mm512_ternarylogic_epi64(sign, small, query_small, 0x1e));
        sum = _mm512_dpbusd_epi32(sum, ones, _mm512_set1_epi8(-1));
        sum = _mm512_dpbusd_epi32(sum, threes, _mm512_set1_epi8(-3));
        sum = _mm512_dpbusd_epi32(sum, _mm512_popcnt_epi8(sign), _mm512_set1_epi8(-5));
      }
    }
    return sum;
  });
}

void multiply_planes(const Rows& codes, int bits, const uint8_t* query, int32_t* sums) {
  const int64_t plane_bytes = codes.bytes / bits;
  const int registers = plane_bytes <= 64 ? 1 : plane_bytes <= 128 ? 2 : 0;
  constexpr void (*multiply[2][3])(const Rows&, const uint8_t*, int32_t*) = {
      {multiply_planes_of<1, 0>, multiply_planes_of<1, 1>, multiply_planes_of<1, 2>},
      {multiply_planes_of<2, 0>, multiply_planes_of<2, 1>, multiply_planes_of<2, 2>}};
  multiply[bits - 1][registers](codes, query, sums);
}

// Bytes of codes with those of the query, of every field by itself: fields above the first are multiples of a power of
// two, as are their sums. A plane is `fixed` pieces, or with 0 any number of bytes.
template <int bits, int fixed>
void multiply_levels_of(const Rows& codes, const uint8_t* query, int32_t* sums) {
  constexpr int planes = planes_of(bits);
  using Planes = Unpack<bits, planes>;
  constexpr int fields = Planes::fields;
  constexpr int64_t piece = Planes::piece;
  const int64_t plane_bytes = codes.bytes / bits;
  for_sixteen(codes, sums, [=](const uint8_t* code) __attribute__((always_inline)) {
    __m512i of_fields[fields];
    for (int f = 0; f < fields; ++f) of_fields[f] = _mm512_setzero_si512();
    const auto add = [&](__m512i bytes, const uint8_t* factors) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int f = 0; f < fields; ++f) {
        const __m512i mask = _mm512_set1_epi8(static_cast<char>(((1 << planes) - 1) << (planes * f)));
        const __m512i field = fields == 1 ? bytes : _mm512_and_si512(bytes, mask);
        of_fields[f] = _mm512_dpbusd_epi32(of_fields[f], field, _mm512_loadu_si512(factors + 64 * f));
      }
    };
    const auto add_piece = [&](int64_t i) __attribute__((always_inline)) {
      add(Planes::template bytes<true>(code + i * piece, plane_bytes, piece), query + i * 64 * fields);
    };
    if constexpr (fixed > 0) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < fixed; ++i) add_piece(i);
    } else {
      const int64_t whole = plane_bytes / piece;
      for (int64_t i = 0; i < whole; ++i) add_piece(i);
      if (whole * piece < plane_bytes) {
        add(Planes::template bytes<false>(code + whole * piece, plane_bytes, plane_bytes - whole * piece),
            query + whole * 64 * fields);
      }
    }
    __m512i sum = of_fields[fields - 1];
#pragma GCC unroll 8
    for (int f = fields - 2; f >= 0; --f) sum = _mm512_add_epi32(_mm512_srai_epi32(sum, planes), of_fields[f]);
    return sum;
  });
}

template <int bits>
void multiply_levels_by(const Rows& codes, const uint8_t* query, int32_t* sums) {
  constexpr int64_t piece = Unpack<bits, planes_of(bits)>::piece;
  const int64_t plane_bytes = codes.bytes / bits;
  switch (plane_bytes % piece == 0 ? plane_bytes / piece : 0) {
    case 1:
      return multiply_levels_of<bits, 1>(codes, query, sums);
    case 2:
      return multiply_levels_of<bits, 2>(codes, query, sums);
    case 3:
      return multiply_levels_of<bits, 3>(codes, query, sums);
    case 4:
      return multiply_levels_of<bits, 4>(codes, query, sums);
    default:
      return multiply_levels_of<bits, 0>(codes, query, sums);
  }
}

void multiply_levels(const Rows& codes, int bits, const uint8_t* query, int32_t* sums) {
  constexpr void (*multiply[])(const Rows&, const uint8_t*, int32_t*) = {
      multiply_levels_by<1>, multiply_levels_by<2>, multiply_levels_by<3>, multiply_levels_by<4>,
      multiply_levels_by<5>, multiply_levels_by<6>, multiply_levels_by<7>, multiply_levels_by<8>,
  };
  multiply[bits - 1](codes, query, sums);
}

// Bytes of the query: a register for each field of each register of a code.
template <int planes>
int64_t dim_of_row_level_of(int64_t index) {
  using Planes = Unpack<planes, planes>;
  const int64_t at = index / 64;
  const int64_t word = at / Planes::fields * 8 + index % 64 / 8;
  return Planes::dim_of(word, at % Planes::fields, index % 8);
}

int64_t dim_of_row_level(int64_t index, int bits) {
  switch (planes_of(bits)) {
    case 1:
      return dim_of_row_level_of<1>(index);
    case 2:
      return dim_of_row_level_of<2>(index);
    case 4:
      return dim_of_row_level_of<4>(index);
    default:
      return dim_of_row_level_of<8>(index);
  }
}

void offer_sums(const int32_t* sums, int64_t count, uint32_t first_id, const float* inverse_norms,
                float query_inverse_norm, int32_t constant, Candidates& candidates) {
  for (int64_t i = 0; i < count; i += Dwords::lanes) {
    const __m512i sum = _mm512_loadu_si512(sums + i);
    offer_dots<Dwords>(_mm512_add_epi32(_mm512_set1_epi32(constant), _mm512_add_epi32(sum, sum)), count - i,
                       first_id + static_cast<uint32_t>(i), inverse_norms + i, query_inverse_norm, candidates);
  }
}

constexpr RowKernels row_kernels = {multiply_planes, multiply_levels, dim_of_row_level, offer_sums};
