// Which worker meets which queries with which codes, and how what the workers kept becomes one result.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "common/threading.hpp"
#include "search/candidates.hpp"
#include "search/search.hpp"

namespace fastembed::search {

// One Candidates for each worker and each query of a batch.
class CandidateBuffers {
 public:
  // `capacity` 0: buffers that grow, for range searches.
  CandidateBuffers(int64_t workers, int64_t queries, int64_t capacity);

  // Those of a worker, emptied.
  Candidates* fresh(int64_t worker, int64_t k, uint32_t limit);

  // What `workers` workers from `first` on kept of a query: its k best, or all of a range search, ordered by (key,
  // position). Entries that do not fit a buffer stand in `scratch`. Null where there is no memory.
  const uint64_t* merge(int64_t first, int64_t workers, int64_t query, int64_t& count,
                        std::unique_ptr<uint64_t[]>& scratch);

 private:
  struct Owned : Candidates {
    Owned() : Candidates{} {}
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    ~Owned() { std::free(entries); }
  };
  static_assert(sizeof(Owned) == sizeof(Candidates), "an array of one is an array of the other");

  int64_t queries_;
  std::vector<Owned> candidates_;
};

// Codes that one worker meets with some queries of a batch. Codes are counted by position: row numbers, or where the
// selection lists ids, places in that list.
struct Piece {
  int64_t first, last;      // positions
  const uint32_t* members;  // ascending numbers of queries within the batch
  int64_t member_count;
};

// The queries whose candidates a worker keeps at a time, and the pieces they meet, in ascending order of positions.
struct Batch {
  int64_t first_query, queries;
  std::vector<Piece> pieces;
  std::vector<std::vector<uint32_t>> member_lists;
};

class Schedule {
 public:
  // A search for the k best, or with k 0 for all below a limit.
  Schedule(int64_t queries, const Matrix& codes, const Selection& selection, int64_t k, int threads);

  int workers() const { return workers_; }

  // Calls scan(batch, piece, candidates, worker) for every piece, `candidates` being those of all queries of the batch;
  // only keys below `limit` are wanted. Then finish(query, entries, count) with the results of each query, ordered by
  // (key, position); it returns whether there was memory for them. Neither may throw. Throws std::bad_alloc.
  template <class Scan, class Finish>
  void run(uint32_t limit, const Scan& scan, const Finish& finish) const {
    CandidateBuffers buffers(workers_, batch_, capacity_);
    std::atomic<bool> failed{false};
    const auto merge = [&](const Batch& batch, int64_t first_worker, int64_t worker_count, int64_t query) {
      std::unique_ptr<uint64_t[]> scratch;
      int64_t count = 0;
      const uint64_t* const entries = buffers.merge(first_worker, worker_count, query, count, scratch);
      if (entries == nullptr || !finish(batch.first_query + query, entries, count)) failed = true;
    };
    if (together_) {
      for (const Batch& batch : batches_) {
        std::atomic<int64_t> next{0};
        parallel_for(workers_, workers_, [&](int64_t worker) {
          Candidates* const mine = buffers.fresh(worker, k_, limit);
          for (int64_t i; (i = next.fetch_add(1)) < static_cast<int64_t>(batch.pieces.size());) {
            scan(batch, batch.pieces[i], mine, worker);
          }
        });
        parallel_for(batch.queries, merge_threads(batch), [&](int64_t query) { merge(batch, 0, workers_, query); });
      }
    } else {
      std::atomic<int64_t> next{0};
      parallel_for(workers_, workers_, [&](int64_t worker) {
        for (int64_t i; (i = next.fetch_add(1)) < static_cast<int64_t>(batches_.size());) {
          Candidates* const mine = buffers.fresh(worker, k_, limit);
          for (const Piece& piece : batches_[i].pieces) scan(batches_[i], piece, mine, worker);
          for (int64_t query = 0; query < batches_[i].queries; ++query) merge(batches_[i], worker, 1, query);
        }
      });
    }
    if (failed) throw std::bad_alloc();
  }

 private:
  void plan(Batch& batch, const Selection& selection, int64_t positions, int64_t piece) const;
  int merge_threads(const Batch& batch) const;

  int64_t k_;         // results of a query, at most
  int64_t capacity_;  // of the buffer of a query, 0 in a range search
  int64_t batch_;     // queries of a batch, at most
  int workers_;
  bool together_;  // whether all workers take pieces of the same batch, or each a batch of its own
  std::vector<Batch> batches_;
};

}  // namespace fastembed::search
