// Threads: OpenMP, on the pool that PyTorch uses when it is loaded (both resolve libgomp.so.1). Results never depend on
// the number of threads: a task computes the same values whoever runs it.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#if defined(__SANITIZE_THREAD__)
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace fastembed {

// How many threads a parallel region over `tasks` tasks gets. `requested` 0 asks OpenMP.
inline int team_size(int64_t tasks, int requested) {
  if (omp_in_parallel()) return 1;
  const int available = requested > 0 ? requested : omp_get_max_threads();
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(available, tasks)));
}

#if defined(__SANITIZE_THREAD__)

// ThreadSanitizer cannot see libgomp's barriers and would report every region as a race; it understands std::thread.
template <class Body>
void run_team(int team, int64_t tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < team; ++i) {
    threads.emplace_back([&] {
      for (int64_t task = next++; task < tasks; task = next++) body(task);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

#else

template <class Body>
void run_team(int team, int64_t tasks, const Body& body) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

#endif

// Runs body(task) for every task in [0, tasks); each thread takes the next task when it is done with one. The body must
// not throw.
template <class Body>
void parallel_for(int64_t tasks, int threads, const Body& body) {
  const int team = team_size(tasks, threads);
  if (team > 1) return run_team(team, tasks, body);
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

}  // namespace fastembed
