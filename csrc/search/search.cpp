// Scheduling of the searches: which queries meet which codes in which task, and how partial results become one.

#include "search/search.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "common/isa.hpp"
#include "common/threading.hpp"
#include "search/candidates.hpp"
#include "search/kernels.hpp"
#include "search/score.hpp"

namespace fastembed::search {
namespace {

#if defined(__x86_64__)
constexpr KernelsByIsa<Kernels> kernels = {{&generic::kernels, &avx2::kernels, nullptr, &avx512vnni::kernels}};
#else
constexpr KernelsByIsa<Kernels> kernels = {{&generic::kernels, nullptr, nullptr, nullptr}};
#endif

// Packed codes that a block holds: they and the queries they meet stay in the first-level cache.
constexpr int64_t block_bytes = 16 << 10;
// Queries that share one packing of the codes, and one read of them from memory.
constexpr int64_t chunk_queries = 64;
// Rearranging a block for fewer queries costs more than it gains.
constexpr int64_t fewest_packed = 4;
// Below so many codes a slice is not worth a task of its own.
constexpr int64_t smallest_slice = 4096;
// Ids within a slice are 32 bits wide.
constexpr int64_t largest_slice = int64_t{1} << 31;
constexpr int64_t tasks_per_thread = 4;
// Bounds the candidate buffers of a worker, 8 bytes each.
constexpr int64_t candidates_per_worker = 1 << 22;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory on cache lines, so that no load of a register straddles two. It is not cleared: pages nobody writes cost
// nothing.
template <class T>
struct Buffer {
  static constexpr std::align_val_t alignment{64};
  struct Delete {
    void operator()(T* memory) const { ::operator delete(memory, alignment); }
  };

  explicit Buffer(int64_t size)
      : data(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), alignment))) {}
  T* at(int64_t index) const { return data.get() + index; }

  std::unique_ptr<T, Delete> data;
};

// A task is one chunk of queries against one slice of the codes. Many queries: few slices, so that each code is packed
// and read seldom. Few queries: many slices, so that every thread has work.
struct Plan {
  Plan(int64_t queries, int64_t codes, int64_t k, int threads) : queries(queries), codes(codes) {
    const int64_t kept = std::min(codes, k + std::max<int64_t>(k, 256));
    chunk = std::clamp<int64_t>(candidates_per_worker / kept, 1, std::min(chunk_queries, queries));
    chunks = ceil_div(queries, chunk);
    const int available = team_size(std::numeric_limits<int64_t>::max(), threads);
    const int64_t wanted = available == 1 ? 1 : ceil_div(available * tasks_per_thread, chunks);
    slice = ceil_div(codes, std::min(wanted, ceil_div(codes, smallest_slice)));
    slice = std::min(slice, largest_slice);
    slices = ceil_div(codes, slice);
    workers = team_size(chunks * slices, threads);
    capacity = std::min(slice, kept);
    results = std::min(slice, k);
  }

  int64_t queries, codes;
  int64_t chunk, chunks;  // queries per task; such chunks
  int64_t slice, slices;  // codes per task; such slices
  int64_t capacity;       // of the candidate buffer of one query
  int64_t results;        // entries at most that a slice leaves for a query
  int workers;
};

// Runs `scan(first_query, query_count, first_code, code_count, candidates, worker)` for every task, then hands each
// query's k best, in order, to `emit(query, rank, key, id)`. Allocates before it starts threads, which must not throw.
template <class Scan, class Emit>
void search(const Plan& plan, int64_t k, uint32_t first_limit, const Scan& scan, const Emit& emit) {
  const int64_t room = plan.capacity + most_added;
  Buffer<uint64_t> entries(plan.workers * plan.chunk * room);
  Buffer<Candidates> candidates(plan.workers * plan.chunk);
  Buffer<uint64_t> partial(plan.queries * plan.slices * plan.results);
  std::atomic<int64_t> next{0};

  parallel_for(plan.workers, plan.workers, [&](int64_t worker) {
    Candidates* const mine = candidates.at(worker * plan.chunk);
    for (int64_t task; (task = next.fetch_add(1)) < plan.chunks * plan.slices;) {
      const int64_t slice = task / plan.chunks;
      const int64_t first_query = task % plan.chunks * plan.chunk;
      const int64_t query_count = std::min(plan.chunk, plan.queries - first_query);
      const int64_t first_code = slice * plan.slice;
      const int64_t code_count = std::min(plan.slice, plan.codes - first_code);
      for (int64_t i = 0; i < query_count; ++i) {
        uint64_t* const buffer = entries.at((worker * plan.chunk + i) * room);
        mine[i] = {buffer, 0, plan.capacity, std::min(k, code_count), first_limit};
      }
      scan(first_query, query_count, first_code, code_count, mine, worker);
      for (int64_t i = 0; i < query_count; ++i) {
        compact(mine[i]);
        std::copy_n(mine[i].entries, mine[i].count,
                    partial.at(((first_query + i) * plan.slices + slice) * plan.results));
      }
    }
  });

  struct Result {
    uint32_t key;
    int64_t id;
    bool operator<(const Result& other) const { return key != other.key ? key < other.key : id < other.id; }
  };
  Buffer<Result> merged(plan.workers * plan.slices * plan.results);
  next = 0;
  parallel_for(plan.workers, plan.workers, [&](int64_t worker) {
    Result* const mine = merged.at(worker * plan.slices * plan.results);
    for (int64_t query; (query = next.fetch_add(1)) < plan.queries;) {
      Result* end = mine;
      for (int64_t slice = 0; slice < plan.slices; ++slice) {
        const int64_t count = std::min(plan.results, plan.codes - slice * plan.slice);
        const uint64_t* const entry = partial.at((query * plan.slices + slice) * plan.results);
        for (int64_t i = 0; i < count; ++i) {
          const auto id = static_cast<uint32_t>(entry[i]);
          *end++ = {static_cast<uint32_t>(entry[i] >> 32), slice * plan.slice + id};
        }
      }
      if (end - mine > k) std::nth_element(mine, mine + k - 1, end);
      std::sort(mine, mine + k);
      for (int64_t rank = 0; rank < k; ++rank) emit(query, rank, mine[rank].key, mine[rank].id);
    }
  });
}

Rows rows_of(const Matrix& matrix, int64_t first, int64_t count) {
  return {matrix.data + first * matrix.stride, matrix.stride, count, matrix.bytes};
}

// Codes of a block of packed codes of `bytes` each, a whole number of groups of `lanes`.
int64_t block_rows(int64_t bytes, int64_t lanes) {
  return std::max<int64_t>(1, block_bytes / std::max<int64_t>(1, bytes * lanes)) * lanes;
}

// Packs every block of a slice once and scans it for all the queries of a chunk.
template <class Pack, class ScanBlock>
void scan_blocks(int64_t first_code, int64_t code_count, int64_t rows, const Pack& pack, const ScanBlock& scan_block) {
  for (int64_t done = 0; done < code_count; done += rows) {
    const int64_t count = std::min(rows, code_count - done);
    pack(first_code + done, count);
    scan_block(first_code + done, count, static_cast<uint32_t>(done));
  }
}

// What SDC by bit planes and by levels share. A packed code has `words` words of type Word, a packed query
// `query_words` of its own type, `lanes` codes stand side by side.
template <class Word, class QueryWord, class Pack, class ScanBlock>
void search_sdc(const SdcMatrix& queries, const SdcMatrix& codes, int64_t k, float* scores, int64_t* ids, int threads,
                int64_t words, int64_t lanes, const QueryWord* packed_queries, int64_t query_words,
                const int32_t* level_sums, const Pack& pack, const ScanBlock& scan_block) {
  const Plan plan(queries.codes.rows, codes.codes.rows, k, threads);
  const int64_t rows = block_rows(words * static_cast<int64_t>(sizeof(Word)), lanes);
  Buffer<Word> blocks(plan.workers * rows * words);
  const auto scan = [&](int64_t first_query, int64_t query_count, int64_t first_code, int64_t code_count,
                        Candidates* candidates, int64_t worker) {
    Word* const block = blocks.at(worker * rows * words);
    const QueryGroup group = {packed_queries + first_query * query_words, query_count, candidates,
                              queries.inverse_norms + first_query,
                              level_sums == nullptr ? nullptr : level_sums + first_query};
    scan_blocks(
        first_code, code_count, rows,
        [&](int64_t first, int64_t count) { pack(rows_of(codes.codes, first, count), block); },
        [&](int64_t first, int64_t count, uint32_t first_id) {
          scan_block(Block{block, count, first_id, codes.inverse_norms + first}, group);
        });
  };
  const auto emit = [&](int64_t query, int64_t rank, uint32_t key, int64_t id) {
    scores[query * k + rank] = score_of_key(key);
    ids[query * k + rank] = id;
  };
  search(plan, k, key_of_score(-std::numeric_limits<float>::infinity()), scan, emit);
}

void search_planes(const SdcMatrix& queries, const SdcMatrix& codes, int64_t dim, int bits, int64_t k, float* scores,
                   int64_t* ids, int threads) {
  const Kernels& isa = kernels.active();
  const int64_t words = bits * words_of(codes.codes.bytes / bits);
  Buffer<uint64_t> packed_queries(queries.codes.rows * words);
  generic::kernels.pack_planes(rows_of(queries.codes, 0, queries.codes.rows), bits, packed_queries.at(0));
  search_sdc<uint64_t>(
      queries, codes, k, scores, ids, threads, words, isa.bit_lanes, packed_queries.at(0), words, nullptr,
      [&](const Rows& some, uint64_t* block) { isa.pack_planes(some, bits, block); },
      [&](const Block& block, const QueryGroup& group) { isa.scan_planes(block, words, bits, dim, group); });
}

void search_levels(const SdcMatrix& queries, const SdcMatrix& codes, int64_t dim, int bits, int64_t k, float* scores,
                   int64_t* ids, int threads) {
  const Kernels& isa = kernels.active();
  const int64_t plane_bytes = codes.codes.bytes / bits;
  const int64_t words = level_words(plane_bytes);
  Buffer<int8_t> levels(queries.codes.rows * words * 8);
  Buffer<int32_t> level_sums(queries.codes.rows);
  for (int64_t row = 0; row < queries.codes.rows; ++row) {
    const uint8_t* const code = queries.codes.data + row * queries.codes.stride;
    int32_t sum = 0;
    for (int64_t index = 0; index < words * 8; ++index) {
      const int64_t d = dim_of_level(index);
      int c = 0;
      for (int plane = 0; plane < bits && d < dim; ++plane) {
        c = 2 * c + (code[plane * plane_bytes + d / 8] >> (7 - d % 8) & 1);
      }
      const int level = d < dim ? 2 * c - ((1 << bits) - 1) : 0;
      *levels.at(row * words * 8 + index) = static_cast<int8_t>(level);
      sum += level;
    }
    *level_sums.at(row) = sum;
  }
  search_sdc<uint32_t>(
      queries, codes, k, scores, ids, threads, words, isa.level_lanes, levels.at(0), words * 8, level_sums.at(0),
      [&](const Rows& some, uint32_t* block) { isa.pack_levels(some, bits, block); },
      [&](const Block& block, const QueryGroup& group) { isa.scan_levels(block, words, bits, group); });
}

}  // namespace

void hamming_topk(const Matrix& queries, const Matrix& codes, int64_t k, int32_t* distances, int64_t* ids,
                  int threads) {
  if (queries.rows == 0) return;
  const Kernels& isa = kernels.active();
  const Plan plan(queries.rows, codes.rows, k, threads);
  const int64_t words = words_of(codes.bytes);
  const int64_t rows = block_rows(words * 8, isa.bit_lanes);
  Buffer<uint64_t> blocks(plan.workers * rows * words);
  Buffer<uint64_t> packed_queries(queries.rows * words);
  generic::kernels.pack_hamming(rows_of(queries, 0, queries.rows), packed_queries.at(0));

  const auto scan = [&](int64_t first_query, int64_t query_count, int64_t first_code, int64_t code_count,
                        Candidates* candidates, int64_t worker) {
    if (query_count == 1) {
      isa.scan_rows(rows_of(codes, first_code, code_count), 0, queries.data + first_query * queries.stride,
                    *candidates);
      return;
    }
    uint64_t* const block = blocks.at(worker * rows * words);
    const QueryGroup group = {packed_queries.at(first_query * words), query_count, candidates, nullptr, nullptr};
    scan_blocks(
        first_code, code_count, rows,
        [&](int64_t first, int64_t count) { isa.pack_hamming(rows_of(codes, first, count), block); },
        [&](int64_t, int64_t count, uint32_t first_id) {
          isa.scan_hamming({block, count, first_id, nullptr}, words, group);
        });
  };
  const auto emit = [&](int64_t query, int64_t rank, uint32_t key, int64_t id) {
    distances[query * k + rank] = static_cast<int32_t>(key);
    ids[query * k + rank] = id;
  };
  search(plan, k, std::numeric_limits<uint32_t>::max(), scan, emit);
}

void sdc_topk(const SdcMatrix& queries, const SdcMatrix& codes, int64_t dim, int bits, int64_t k, float* scores,
              int64_t* ids, int threads) {
  if (queries.codes.rows == 0) return;
  if (bits <= 2) {
    search_planes(queries, codes, dim, bits, k, scores, ids, threads);
  } else {
    search_levels(queries, codes, dim, bits, k, scores, ids, threads);
  }
}

void rescore(const float* queries, int64_t rows, const float* documents, int64_t dim, const int64_t* candidates,
             int64_t count, int64_t k, float* scores, int64_t* ids, int threads) {
  struct Result {
    float score;
    int64_t id;
    // A NaN score comes last, as the worst.
    bool operator<(const Result& other) const {
      if (score > other.score) return true;
      if (score < other.score) return false;
      const bool bad = std::isnan(score), other_bad = std::isnan(other.score);
      return bad != other_bad ? other_bad : id < other.id;
    }
  };
  Buffer<Result> results(rows * count);
  parallel_for(rows, threads, [&](int64_t row) {
    const float* const query = queries + row * dim;
    Result* const mine = results.at(row * count);
    for (int64_t i = 0; i < count; ++i) {
      const float* const document = documents + candidates[row * count + i] * dim;
      // Sixteen running sums: the compiler may vectorise them and still every machine adds in the same order.
      constexpr int64_t width = 16;
      float sums[width] = {};
      int64_t d = 0;
      for (; d + width <= dim; d += width) {
        for (int64_t j = 0; j < width; ++j) sums[j] += query[d + j] * document[d + j];
      }
      for (int64_t j = 0; d + j < dim; ++j) sums[j] += query[d + j] * document[d + j];
      for (int64_t half = width / 2; half > 0; half /= 2) {
        for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
      }
      mine[i] = {sums[0], candidates[row * count + i]};
    }
    std::partial_sort(mine, mine + k, mine + count);
    for (int64_t rank = 0; rank < k; ++rank) {
      scores[row * k + rank] = mine[rank].score;
      ids[row * k + rank] = mine[rank].id;
    }
  });
}

}  // namespace fastembed::search
