// Threads: OpenMP, on the pool that PyTorch uses when it is loaded (both resolve libgomp.so.1). Results never depend on
// the number of threads: a task computes the same values whoever runs it.
#pragma once

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace fastembed {

// How many threads a parallel region over `tasks` tasks gets. `requested` 0 asks OpenMP.
inline int team_size(int64_t tasks, int requested) {
  if (omp_in_parallel()) return 1;
  const int available = requested > 0 ? requested : omp_get_max_threads();
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(available, tasks)));
}

inline void spin() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
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

template <class Body>
void run_team_in_runs(int team, int64_t tasks, const Body& body) {
  run_team(team, tasks, body);
}

#else

// Whether this thread came out of a fork. The threads that OpenMP keeps for it stayed with the parent, and a parallel
// region would wait for them for ever.
inline thread_local bool came_out_of_a_fork = false;
inline const int fork_watch = pthread_atfork(nullptr, nullptr, [] { came_out_of_a_fork = true; });

// At the end of a region, waits a while for the rest of the team, if each of it has a processor. Threads that come to
// its barrier one after another sleep there (OMP_WAIT_POLICY=passive), and waking one, to end this region or to begin
// the next, costs a virtual machine 20 to 40 us.
inline void wait_for_team(std::atomic<int>& done) {
  constexpr int most_spins = 1 << 11;
  static const int processors = omp_get_num_procs();
  const int team = omp_get_num_threads();
  if (team > processors) return;
  done.fetch_add(1, std::memory_order_relaxed);
  for (int i = 0; i < most_spins && done.load(std::memory_order_relaxed) < team; ++i) spin();
}

// A parallel region in which every thread of the team runs `share`, a loop that they share out and do not wait after:
// here, or where that would hang on a new thread, for which OpenMP starts others.
template <class Share>
void run_region(int team, const Share& share) {
  const auto region = [&] {
    std::atomic<int> done{0};
#pragma omp parallel num_threads(team)
    {
      share();
      wait_for_team(done);
    }
  };
  if (!came_out_of_a_fork) return region();
  std::thread(region).join();
}

template <class Body>
void run_team(int team, int64_t tasks, const Body& body) {
  run_region(team, [&] {
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t task = 0; task < tasks; ++task) body(task);
  });
}

template <class Body>
void run_team_in_runs(int team, int64_t tasks, const Body& body) {
  run_region(team, [&] {
#pragma omp for schedule(guided, 1) nowait
    for (int64_t task = 0; task < tasks; ++task) body(task);
  });
}

#endif

// Waits for other threads' work of a few microseconds; on a machine with more threads than cores, for longer.
class Wait {
 public:
  void pause() {
    if (++rounds_ > most_spins) return std::this_thread::yield();
    spin();
  }

 private:
  static constexpr int most_spins = 1 << 12;
  int rounds_ = 0;
};

// Runs body(task) for every task in [0, tasks); each thread takes the next task when it is done with one. The body must
// not throw.
template <class Body>
void parallel_for(int64_t tasks, int threads, const Body& body) {
  const int team = team_size(tasks, threads);
  if (team > 1) return run_team(team, tasks, body);
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

// parallel_for where a thread takes a long run of tasks at first and ever shorter ones towards the end: for tasks whose
// neighbours share something that two threads should not both be at, such as fresh pages.
template <class Body>
void parallel_for_in_runs(int64_t tasks, int threads, const Body& body) {
  const int team = team_size(tasks, threads);
  if (team > 1) return run_team_in_runs(team, tasks, body);
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

// Rounds of parallel_for over `first_tasks` and then over `second_tasks`, by one team: waking a team takes as long as a
// small round. second(round, ..) begins when all of first(round, ..) is done, and first(round, ..) when all of
// second(round - 2, ..) is, so that a thread that finds nothing left to do in a round goes on with the next: what the
// first tasks write needs room for two rounds.
template <class First, class Second>
void parallel_rounds(int64_t rounds, int64_t first_tasks, const First& first, int64_t second_tasks,
                     const Second& second, int team) {
  if (team == 1) {
    for (int64_t round = 0; round < rounds; ++round) {
      for (int64_t task = 0; task < first_tasks; ++task) first(round, task);
      for (int64_t task = 0; task < second_tasks; ++task) second(round, task);
    }
    return;
  }
  const int64_t per_round = first_tasks + second_tasks, tasks = rounds * per_round;
  std::atomic<int64_t> next{0};
  std::vector<std::atomic<int64_t>> done_first(rounds), done_second(rounds);
  // Whoever waits here waits for running threads only: all of the tasks in question have been taken by then.
  const auto wait_for = [](const std::atomic<int64_t>& done, int64_t count) {
    for (Wait wait; done.load(std::memory_order_acquire) < count;) wait.pause();
  };
  const auto take = [&](int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) {
      const int64_t round = task / per_round, i = task % per_round;
      if (i < first_tasks) {
        if (round > 1) wait_for(done_second[round - 2], second_tasks);
        first(round, i);
        done_first[round].fetch_add(1, std::memory_order_release);
      } else {
        wait_for(done_first[round], first_tasks);
        second(round, i - first_tasks);
        done_second[round].fetch_add(1, std::memory_order_release);
      }
    }
  };
  run_team(team, team, take);
}

}  // namespace fastembed
