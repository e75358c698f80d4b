// AVX-512 with VPOPCNTDQ, BITALG, VBMI, GFNI and VNNI.

#include <immintrin.h>

#include "search/kernels.hpp"
#include "search/score.hpp"

namespace fastembed::search::avx512vnni {
namespace {

#include "search/dwords_avx512vnni.inl"
#include "search/level_kernels.inl"
#include "search/lookups_avx512vnni.inl"
#include "search/planes_avx512vnni.inl"
#include "search/popcount_kernels.inl"

struct Word512 {
  using Word = __m512i;
  static constexpr int64_t lanes = 8;
  static constexpr int64_t query_group = 4;

  static Word zero() { return _mm512_setzero_si512(); }
  static Word splat(int64_t a) { return _mm512_set1_epi64(a); }
  static Word load(const uint64_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint64_t* p, Word a) { _mm512_storeu_si512(p, a); }
  static Word broadcast(const uint64_t* p) { return _mm512_set1_epi64(static_cast<long long>(*p)); }
  static Word add(Word a, Word b) { return _mm512_add_epi64(a, b); }
  static Word popcount(Word a) { return _mm512_popcnt_epi64(a); }
  static Word unite(Word a, Word b) { return _mm512_or_si512(a, b); }
  static bool any_negative(Word a) { return _mm512_movepi64_mask(a) != 0; }
  static Word exclusive_or(Word a, Word b) { return _mm512_xor_si512(a, b); }
  static Word exclusive_or(Word a, Word b, Word c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  static Word majority(Word a, Word b, Word c) { return _mm512_ternarylogic_epi64(a, b, c, 0xe8); }
  static Word xor_of_and(Word a, Word b, Word c) { return _mm512_ternarylogic_epi64(a, b, c, 0x78); }
  static Word xor_of_or(Word a, Word b, Word c) { return _mm512_ternarylogic_epi64(a, b, c, 0x1e); }
  static Word carry(Word sum, Word differ, Word first) { return _mm512_ternarylogic_epi64(differ, sum, first, 0x3a); }
  static Word carry_of_sums(Word sum, Word a, Word b) { return _mm512_ternarylogic_epi64(sum, a, b, 0x8e); }

  static void gather(const uint8_t* row, int64_t stride, int64_t rows, int64_t bytes, uint64_t* block, int64_t step) {
    for (int64_t done = 0; done < bytes; done += 64) {
      const __mmask64 mask = first_bytes(bytes - done);
      __m512i words[8];
#pragma GCC unroll 8
      for (int64_t i = 0; i < 8; ++i) {
        words[i] = i < rows ? load_bytes(row + i * stride + done, mask) : _mm512_setzero_si512();
      }
      transpose(words);
      for (int64_t i = 0; i < 8 && done + 8 * i < bytes; ++i, block += step) _mm512_storeu_si512(block, words[i]);
    }
  }

  static uint32_t below(Word counts, uint32_t limit) {
    return _mm512_cmplt_epu64_mask(counts, _mm512_set1_epi64(limit));
  }

  // Adds the lanes whose bit is set in `below`.
  static void add_lanes(Candidates& candidates, uint32_t below, Word counts, uint32_t first_id) {
    const __m512i ids = _mm512_add_epi64(_mm512_set1_epi64(first_id), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
    const __m512i entries = _mm512_or_si512(_mm512_slli_epi64(counts, 32), ids);
    const __m512i packed = _mm512_maskz_compress_epi64(static_cast<__mmask8>(below), entries);
    _mm512_storeu_si512(candidates.entries + candidates.count, packed);
    count_added(candidates, __builtin_popcount(below));
  }

  // In the low half.
  static Dwords::Word to_dwords(Word a) { return _mm512_zextsi256_si512(_mm512_cvtepi64_epi32(a)); }
};

using Bits = BitKernels<Word512, Dwords>;
using Levels = LevelKernels<Dwords>;

// One query against rows as they lie, eight rows at a time. The popcounts of a row, at most 64 for each of up to three
// words, fit a byte per 64-bit lane: shifted by a byte per row they merge into one register, which vpermb turns so that
// each lane holds the eight counts of one row, for vpsadbw to sum. Rows from `rows` on repeat the first. `load(row, w)`
// reads a word.
template <int words, class Load>
inline __m512i distances_of_eight(const uint8_t* row, int64_t stride, int64_t rows, const __m512i (&query)[words],
                                  const Load& load) {
  __m512i merged = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const uint8_t* const code = row + (i < rows ? i * stride : 0);
    __m512i counts = _mm512_popcnt_epi64(_mm512_xor_si512(load(code, 0), query[0]));
#pragma GCC unroll 2
    for (int w = 1; w < words; ++w) {
      counts = _mm512_add_epi64(counts, _mm512_popcnt_epi64(_mm512_xor_si512(load(code, w), query[w])));
    }
    merged = _mm512_or_si512(merged, _mm512_slli_epi64(counts, 8 * i));
  }
  return _mm512_sad_epu8(transpose_bytes(merged), _mm512_setzero_si512());
}

// Any width: rows one after the other, so that memory is read in one stream, and their sums added up together.
inline __m512i distances_of_long_rows(const uint8_t* row, int64_t stride, int64_t rows, int64_t bytes,
                                      const uint8_t* query) {
  __m512i counts[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const uint8_t* const code = row + (i < rows ? i * stride : 0);
    counts[i] = _mm512_setzero_si512();
    for (int64_t done = 0; done < bytes; done += 64) {
      const __mmask64 mask = first_bytes(bytes - done);
      const __m512i word = _mm512_xor_si512(load_bytes(code + done, mask), load_bytes(query + done, mask));
      counts[i] = _mm512_add_epi64(counts[i], _mm512_popcnt_epi64(word));
    }
  }
  transpose(counts);
  for (int step = 1; step < 8; step *= 2) {
    for (int i = 0; i < 8; i += 2 * step) counts[i] = _mm512_add_epi64(counts[i], counts[i + step]);
  }
  return counts[0];
}

// `distances(row, rows)` gives the distances of up to eight rows.
template <class Distances>
inline void collect(const Rows& codes, uint32_t first_id, Candidates& candidates, const Distances& distances) {
  const auto collect_eight = [&](int64_t row, int64_t rows) {
    const __m512i found = distances(codes.data + row * codes.stride, rows);
    const uint32_t below = Word512::below(found, candidates.limit) & static_cast<uint32_t>(first_bytes(rows));
    if (__builtin_expect(below == 0, 1)) return;
    Word512::add_lanes(candidates, below, found, first_id + static_cast<uint32_t>(row));
  };
  int64_t row = 0;
  for (; row + 8 <= codes.count; row += 8) collect_eight(row, 8);
  if (row < codes.count) collect_eight(row, codes.count - row);
}

template <int words>
void scan_short_rows(const Rows& codes, uint32_t first_id, const uint8_t* query, Candidates& candidates) {
  const __mmask64 last_mask = first_bytes(codes.bytes - 64 * (words - 1));
  __m512i query_words[words];
  for (int w = 0; w < words; ++w) {
    query_words[w] = load_bytes(query + 64 * w, w == words - 1 ? last_mask : ~__mmask64{0});
  }
  collect(codes, first_id, candidates, [&](const uint8_t* row, int64_t rows) {
    return distances_of_eight(row, codes.stride, rows, query_words, [&](const uint8_t* code, int w) {
      return w == words - 1 ? load_bytes(code + 64 * w, last_mask) : _mm512_loadu_si512(code + 64 * w);
    });
  });
}

// Rows as long as `words` cache lines that all begin at the same place in a line, not at its start: NumPy's arrays
// begin 16 bytes behind it. No load straddles two lines: one word has what there is of the row in its first line and in
// its last, the others a line each, and the query is turned the same way.
template <int words>
void scan_rows_of_lines(const Rows& codes, uint32_t first_id, const uint8_t* query, Candidates& candidates) {
  const auto before = static_cast<int64_t>(reinterpret_cast<uintptr_t>(codes.data) % 64);  // the row, in its first line
  const __mmask64 last = first_bytes(before), first = ~last;
  uint8_t turned[64 * words];
  for (int64_t i = 0; i < 64 * words; ++i) turned[(i + before) % (64 * words)] = query[i];
  __m512i query_words[words];
  for (int w = 0; w < words; ++w) query_words[w] = _mm512_loadu_si512(turned + 64 * w);
  collect(codes, first_id, candidates, [&](const uint8_t* row, int64_t rows) {
    return distances_of_eight(row, codes.stride, rows, query_words, [&](const uint8_t* code, int w) {
      const uint8_t* const line = code - before + 64 * w;
      return w == 0 ? _mm512_mask_loadu_epi8(load_bytes(line, first), last, line + 64 * words)
                    : _mm512_load_si512(line);
    });
  });
}

void scan_rows(const Rows& codes, uint32_t first_id, const uint8_t* query, Candidates& candidates) {
  // A load of 64 bytes is two of 32, which may lie in two lines.
  if (codes.stride % 64 == 0 && reinterpret_cast<uintptr_t>(codes.data) % 32 != 0) {
    if (codes.bytes == 128) return scan_rows_of_lines<2>(codes, first_id, query, candidates);
    if (codes.bytes == 192) return scan_rows_of_lines<3>(codes, first_id, query, candidates);
  }
  if (codes.bytes <= 64) return scan_short_rows<1>(codes, first_id, query, candidates);
  if (codes.bytes <= 128) return scan_short_rows<2>(codes, first_id, query, candidates);
  if (codes.bytes <= 192) return scan_short_rows<3>(codes, first_id, query, candidates);
  collect(codes, first_id, candidates, [&](const uint8_t* row, int64_t rows) {
    return distances_of_long_rows(row, codes.stride, rows, codes.bytes, query);
  });
}

}  // namespace

const Kernels kernels = {
    Bits::lanes,
    Levels::lanes,
    scan_rows,
    Bits::pack_hamming,
    Bits::scan_hamming,
    Bits::pack_planes,
    Bits::scan_planes,
    pack_levels,
    dim_of_level,
    Levels::scan_levels,
    &LookupKernels<LookupBytes>::table,
    &row_kernels,
};

}  // namespace fastembed::search::avx512vnni
