// The most that this machine's cores and memory can do, as rates per second.
//
// Compiled with -march=native on the machine that is measured, never shipped. The arithmetic loops stay in registers,
// with enough independent chains to hide the latency of every instruction; an empty asm statement makes each operand
// look changed, so that the compiler can neither hoist nor fold anything.
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

using FloatVector = float __attribute__((vector_size(vector_bytes)));
using IntVector = int32_t __attribute__((vector_size(vector_bytes)));
using WordVector = uint64_t __attribute__((vector_size(vector_bytes)));

template <class T>
inline void opaque(T& value) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(value));
#elif defined(__x86_64__)
  asm volatile("" : "+x"(value));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(value));
#else
  asm volatile("" : "+m"(value));
#endif
}

// The thread's own processor time, so that other programs on the machine do not lower the limit.
double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// What `body(thread)` returns on every thread, all started together.
template <class Body>
std::vector<double> on_threads(int threads, const Body& body) {
  std::atomic<int> waiting{threads};
  std::vector<double> results(threads);
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread) {
    pool.emplace_back([&, thread] {
      --waiting;
      while (waiting.load() > 0) std::this_thread::yield();
      results[thread] = body(thread);
    });
  }
  for (std::thread& thread : pool) thread.join();
  return results;
}

// Sum over threads of the rates that `body(thread)` returns.
template <class Body>
double total_rate(int threads, const Body& body) {
  const std::vector<double> rates = on_threads(threads, body);
  return std::accumulate(rates.begin(), rates.end(), 0.0);
}

constexpr int batch = 4096;

// Operations per second of `run`, which does `operations` of them `batch` times. `run` keeps its sums in local
// variables: captured ones would be stored at every step.
template <class Run>
double rate(double seconds, double operations, const Run& run) {
  const double start = thread_seconds();
  double elapsed = 0;
  int64_t batches = 0;
  while ((elapsed = thread_seconds() - start) < seconds) {
    run();
    ++batches;
  }
  return operations * batch * batches / elapsed;
}

constexpr int chains = 12;

// Products of unsigned and signed bytes, added to 32-bit sums, by the best instruction the machine has.
inline IntVector dot_bytes(IntVector sum, IntVector a, IntVector b) {
#if defined(__AVX512VNNI__)
  return (IntVector)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
  return (IntVector)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX512BW__)
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)a, (__m512i)b);
  return (IntVector)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
  return (IntVector)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (IntVector)vdotq_s32((int32x4_t)sum, (int8x16_t)a, (int8x16_t)b);
#else
  for (int shift = 0; shift < 32; shift += 8) sum += ((a >> shift) & 255) * ((b << (24 - shift)) >> 24);
  return sum;
#endif
}

inline WordVector count_bits(WordVector words) {
#if defined(__AVX512VPOPCNTDQ__)
  return (WordVector)_mm512_popcnt_epi64((__m512i)words);
#else
  for (int i = 0; i < vector_bytes / 8; ++i) words[i] = __builtin_popcountll(words[i]);
  return words;
#endif
}

// The best rate over `repeats` passes in which every thread goes through its own part of `bytes` at `data`; without
// data, of a buffer in huge pages. `pass(data, bytes)` touches all of it.
template <class Pass>
double stream_rate(int threads, char* data, size_t bytes, int repeats, const Pass& pass) {
  constexpr size_t huge_page = 1 << 21, step = 1 << 18;
  std::unique_ptr<char, decltype(&free)> own(nullptr, &free);
  const size_t part = bytes / threads / step * step;
  if (data == nullptr) {
    const size_t size = (bytes + huge_page - 1) / huge_page * huge_page;
    own.reset(static_cast<char*>(aligned_alloc(huge_page, size)));
    if (!own) return 0;
    data = own.get();
#ifdef MADV_HUGEPAGE
    madvise(data, size, MADV_HUGEPAGE);
#endif
    memset(data, 1, size);
  }
  // Pass by pass: a thread that is done early leaves its share of the memory's bandwidth to the others.
  double best = 0;
  for (int i = 0; i < repeats; ++i) {
    const std::vector<double> seconds = on_threads(threads, [&](int thread) {
      const double start = thread_seconds();
      pass(data + part * thread, part);
      return thread_seconds() - start;
    });
    best = std::max(best, part * threads / *std::max_element(seconds.begin(), seconds.end()));
  }
  return best;
}

// Reading several streams at once, `gap` bytes apart, each asked for `ahead` bytes before its use (0: not at all).
template <int streams, size_t gap, size_t ahead>
void read_pass(const char* data, size_t bytes) {
  WordVector seen[streams] = {};
  const size_t blocks = bytes / (streams * gap) * (streams * gap);
  for (size_t block = 0; block < blocks; block += streams * gap)
    for (size_t offset = 0; offset < gap; offset += vector_bytes)
#pragma GCC unroll 8
      for (int stream = 0; stream < streams; ++stream) {
        const char* at = data + block + stream * gap + offset;
        if (ahead > 0 && offset % 64 == 0) __builtin_prefetch(at + ahead, 0, 2);
        seen[stream] |= *reinterpret_cast<const WordVector*>(at);
      }
  for (size_t offset = blocks; offset + vector_bytes <= bytes; offset += vector_bytes)
    seen[0] |= *reinterpret_cast<const WordVector*>(data + offset);
  for (WordVector& words : seen) opaque(words);
}

inline void store_past_caches(WordVector* to, WordVector words) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)to, (__m512i)words);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)to, (__m256i)words);
#else
  *to = words;
#endif
}

void write_pass(char* data, size_t bytes) {
  WordVector ones = WordVector{} + 1;
  for (size_t offset = 0; offset < bytes; offset += vector_bytes) {
    opaque(ones);
    store_past_caches(reinterpret_cast<WordVector*>(data + offset), ones);
  }
}

// Calls work(i) for every i below `count`; a thread that is done with one takes the next.
template <class Work>
void for_pieces(int threads, int count, const Work& work) {
  std::atomic<int> next{0};
  const auto take = [&] {
    for (int i = next++; i < count; i = next++) work(i);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(take);
  take();
  for (std::thread& other : others) other.join();
}

}  // namespace

extern "C" {

double limit_int8(int threads, double seconds) {
  return total_rate(threads, [=](int) {
    return rate(seconds, 2.0 * chains * vector_bytes, [] {
      IntVector a{}, b{}, sums[chains] = {};
      for (int i = 0; i < batch; ++i) {
        opaque(a);
        opaque(b);
#pragma GCC unroll 16
        for (IntVector& sum : sums) {
          sum = dot_bytes(sum, a, b);
          opaque(sum);
        }
      }
    });
  });
}

double limit_float32(int threads, double seconds) {
  return total_rate(threads, [=](int) {
    return rate(seconds, 2.0 * chains * vector_bytes / sizeof(float), [] {
      FloatVector a{}, b{}, sums[chains] = {};
      for (int i = 0; i < batch; ++i) {
        opaque(a);
        opaque(b);
#pragma GCC unroll 16
        for (FloatVector& sum : sums) {
          sum += a * b;
          opaque(sum);
        }
      }
    });
  });
}

double limit_popcount(int threads, double seconds) {
  return total_rate(threads, [=](int) {
    return rate(seconds, 8.0 * chains * vector_bytes, [] {
      WordVector code{}, query{}, sums[chains] = {};
      for (int i = 0; i < batch; ++i) {
#pragma GCC unroll 16
        for (WordVector& sum : sums) {
          opaque(code);
          opaque(query);
          sum += count_bits(code ^ query);
          opaque(sum);
        }
      }
    });
  });
}

// The best of several ways to read: which one is, differs between processors and kinds of pages.
double limit_read(int threads, char* data, size_t bytes, int repeats) {
  const auto rate_of = [&](void (*pass)(const char*, size_t)) {
    return stream_rate(threads, data, bytes, repeats, pass);
  };
  return std::max({rate_of(read_pass<8, vector_bytes, 0>), rate_of(read_pass<4, vector_bytes, 4096>),
                   rate_of(read_pass<4, 1 << 16, 0>), rate_of(read_pass<8, 4096, 1 << 15>)});
}

// Reads `count` pieces of memory, whole vectors of them, as fast as the machine can; a thread that is done with one
// takes the next.
void read_pieces(int threads, char* const* data, const size_t* bytes, int count) {
  for_pieces(threads, count, [&](int i) { read_pass<8, 4096, 1 << 15>(data[i], bytes[i]); });
}

// Writes them.
void write_pieces(int threads, char* const* data, const size_t* bytes, int count) {
  for_pieces(threads, count, [&](int i) { write_pass(data[i], bytes[i]); });
}

double limit_write(int threads, char* data, size_t bytes, int repeats) {
  return std::max(stream_rate(threads, data, bytes, repeats, write_pass),
                  stream_rate(threads, data, bytes, repeats, [](char* part, size_t size) { memset(part, 1, size); }));
}
}
