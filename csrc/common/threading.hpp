// Threads: OpenMP, on the pool that PyTorch uses when it is loaded (both resolve libgomp.so.1). Results never depend on
// the number of threads: a task computes the same values whoever runs it.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace fastembed {

// How many threads a parallel region over `tasks` tasks gets. `requested` 0 asks OpenMP.
inline int team_size(int64_t tasks, int requested) {
  if (omp_in_parallel()) return 1;
  const int available = requested > 0 ? requested : omp_get_max_threads();
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(available, tasks)));
}

// Runs body(task) for every task in [0, tasks); each thread takes the next task when it is done with one. The body must
// not throw.
template <class Body>
void parallel_for(int64_t tasks, int threads, const Body& body) {
  const int team = team_size(tasks, threads);
  if (team == 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

}  // namespace fastembed
