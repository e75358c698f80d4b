// Pages of memory that a call is about to write.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastembed {

// Less memory is mostly some that the allocator has handed out before.
constexpr int64_t bytes_for_huge_pages = 8 << 20;

#if defined(__linux__) && defined(MADV_HUGEPAGE)

constexpr uintptr_t page_bytes = 4096;
constexpr uintptr_t huge_page_bytes = uintptr_t{2} << 20;

// The system clears every page of fresh memory when it is first written to, which pages of 2 MB make four times
// cheaper. Only a hint. It covers what shares a page with either end: an allocation begins a few bytes after a multiple
// of 2 MB, and without them its first 2 MB would stay in pages of 4 KB.
inline void ask_for_huge_pages(void* data, int64_t bytes) {
  if (bytes < bytes_for_huge_pages) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / page_bytes * page_bytes;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes + page_bytes - 1) / page_bytes * page_bytes;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// How many huge pages memory of this many bytes can touch, wherever it begins.
inline int64_t huge_pages_of(int64_t bytes) { return bytes / static_cast<int64_t>(huge_page_bytes) + 2; }

// Has the system clear one huge page of fresh memory, the `index`th that [data, data + bytes) touches, if there are so
// many: by writing a zero to it, so the memory must hold nothing yet.
inline void touch_huge_page(void* data, int64_t bytes, int64_t index) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t page = (begin / huge_page_bytes + static_cast<uintptr_t>(index)) * huge_page_bytes;
  if (page < end && begin < end) *reinterpret_cast<volatile char*>(page > begin ? page : begin) = 0;
}

// Whether most of the memory has never been written to, by a sample of its pages. False where nobody can tell.
inline bool is_fresh(const void* data, int64_t bytes) {
  constexpr int samples = 8;
  int fresh = 0;
  for (int i = 0; i < samples; ++i) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(data) + (2 * i + 1) * bytes / (2 * samples);
    unsigned char resident = 1;
    fresh += mincore(reinterpret_cast<void*>(at / page_bytes * page_bytes), page_bytes, &resident) == 0 &&
             (resident & 1) == 0;
  }
  return 2 * fresh > samples;
}

#else

inline void ask_for_huge_pages(void*, int64_t) {}
inline int64_t huge_pages_of(int64_t) { return 0; }
inline void touch_huge_page(void*, int64_t, int64_t) {}
inline bool is_fresh(const void*, int64_t) { return false; }

#endif

}  // namespace fastembed
