#include "search/schedule.hpp"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <utility>

#include "common/divide_up.hpp"

namespace fastembed::search {
namespace {

// Queries that share one packing of the codes, and one read of them from memory.
constexpr int64_t largest_batch = 1024;
// Bounds the candidate buffers of a worker, 8 bytes each.
constexpr int64_t candidates_per_worker = 1 << 22;
// Bounds the pieces that ranges are cut into.
constexpr int64_t ranges_per_batch = 1 << 14;
// Entries that the buffer of a query takes before it is cut back to k, at least: each time the limit falls.
constexpr int64_t fewest_added = 12;
// First capacity of a range search.
constexpr int64_t first_capacity = 256;

// Codes of a piece: many pieces so that no worker waits long for the last one, but none so small that taking it shows.
// A multiple of the smallest, which is of all blocks, so that no piece ends in a part of one.
constexpr int64_t pieces_per_worker = 16;
constexpr int64_t smallest_piece = 512;
constexpr int64_t largest_piece = 1 << 16;
// Bytes compared, and results merged, by a worker in the time that it takes to wake it.
constexpr int64_t bytes_worth_a_worker = 1 << 21;
constexpr int64_t results_worth_a_worker = 1 << 12;

struct Range {
  int64_t first, last;
};

// A query's ranges as positions, in ascending order, those that touch or overlap joined into one.
std::vector<Range> ranges_of(const Selection& selection, int64_t query) {
  std::vector<Range> ranges;
  for (int64_t i = 0; i < selection.range_count; ++i) {
    const int64_t* const rows = selection.ranges + (query * selection.range_count + i) * 2;
    Range range = {rows[0], rows[1]};
    if (selection.has_ids()) {
      const int64_t* const ids_end = selection.ids + selection.id_count;
      range.first = std::lower_bound(selection.ids, ids_end, rows[0]) - selection.ids;
      range.last = std::lower_bound(selection.ids, ids_end, rows[1]) - selection.ids;
    }
    if (range.first < range.last) ranges.push_back(range);
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.first < b.first; });
  std::vector<Range> joined;
  for (const Range& range : ranges) {
    if (joined.empty() || joined.back().last < range.first) {
      joined.push_back(range);
    } else {
      joined.back().last = std::max(joined.back().last, range.last);
    }
  }
  return joined;
}

}  // namespace

CandidateBuffers::CandidateBuffers(int64_t workers, int64_t queries, int64_t capacity)
    : queries_(queries), candidates_(workers * queries) {
  for (Owned& candidates : candidates_) {
    candidates.capacity = capacity == 0 ? first_capacity : capacity;
    candidates.make_room = capacity == 0 ? grow : keep_best;
    const auto bytes = static_cast<size_t>(candidates.capacity + most_added) * sizeof(uint64_t);
    candidates.entries = static_cast<uint64_t*>(std::malloc(bytes));
    if (candidates.entries == nullptr) throw std::bad_alloc();
  }
}

Candidates* CandidateBuffers::fresh(int64_t worker, int64_t k, uint32_t limit) {
  Owned* const mine = candidates_.data() + worker * queries_;
  for (int64_t i = 0; i < queries_; ++i) {
    mine[i].count = 0;
    mine[i].k = k;
    mine[i].limit = limit;
  }
  return mine;
}

const uint64_t* CandidateBuffers::merge(int64_t first, int64_t workers, int64_t query, int64_t& count,
                                        std::unique_ptr<uint64_t[]>& scratch) {
  const auto kept = [&](int64_t worker) -> Candidates& { return candidates_[(first + worker) * queries_ + query]; };
  count = 0;
  for (int64_t worker = 0; worker < workers; ++worker) {
    if (kept(worker).k == out_of_memory) return nullptr;
    if (kept(worker).make_room == keep_best) keep_best(kept(worker));
    count += kept(worker).count;
  }
  scratch.reset(new (std::nothrow) uint64_t[2 * count + 1]);
  if (scratch == nullptr) return nullptr;

  // Positions ascend within the list of each worker: merged by position, ties are in order already.
  uint64_t *entries = scratch.get(), *other = entries + count;
  int64_t merged = 0;
  for (int64_t worker = 0; worker < workers; ++worker) {
    const Candidates& list = kept(worker);
    std::merge(entries, entries + merged, list.entries, list.entries + list.count, other,
               [](uint64_t a, uint64_t b) { return id_of(a) < id_of(b); });
    std::swap(entries, other);
    merged += list.count;
  }
  if (kept(0).make_room == keep_best) {
    Candidates all = {entries, count, count, kept(0).k, 0, keep_best};
    keep_best(all);
    count = all.count;
  }
  sort_by_key(entries, count, other);
  return entries;
}

Schedule::Schedule(int64_t queries, const Matrix& codes, const Selection& selection, int64_t k, int threads) {
  const int64_t positions = !selection.has_ids() ? codes.rows : selection.id_count;
  // A buffer of one entry at least, and a k of one: no rank is looked for among no entries.
  k_ = std::clamp<int64_t>(k, 1, std::max<int64_t>(1, positions));
  capacity_ = k == 0 ? 0 : std::min(std::max<int64_t>(1, positions), k_ + std::max<int64_t>(k_, fewest_added));

  const int64_t available = team_size(std::numeric_limits<int64_t>::max(), threads);
  const int64_t worth = divide_up(std::max<int64_t>(1, codes.bytes) * positions, bytes_worth_a_worker);
  const int64_t useful = worth > available / std::max<int64_t>(1, queries) ? available : worth * queries;
  workers_ = static_cast<int>(std::clamp<int64_t>(useful, 1, available));
  batch_ = std::min({queries, largest_batch, std::max<int64_t>(1, candidates_per_worker / (capacity_ + most_added))});
  if (selection.has_ranges()) {
    batch_ = std::min(batch_, std::max<int64_t>(1, ranges_per_batch / std::max<int64_t>(1, selection.range_count)));
  }
  together_ = workers_ == 1 || positions >= smallest_piece * 2 * workers_ || queries < 2 * workers_;
  if (!together_) batch_ = std::min(batch_, divide_up(queries, 4 * workers_));
  const int64_t piece = workers_ == 1 || !together_
                            ? std::max<int64_t>(1, positions)
                            : std::clamp(positions / (workers_ * pieces_per_worker) / smallest_piece * smallest_piece,
                                         smallest_piece, largest_piece);

  batches_.resize(divide_up(queries, batch_));
  for (size_t i = 0; i < batches_.size(); ++i) {
    batches_[i].first_query = static_cast<int64_t>(i) * batch_;
    batches_[i].queries = std::min(batch_, queries - batches_[i].first_query);
    plan(batches_[i], selection, positions, piece);
  }
}

// A sweep over the ends of all ranges: between two of them, the same queries want the codes.
void Schedule::plan(Batch& batch, const Selection& selection, int64_t positions, int64_t piece) const {
  const auto add = [&](int64_t first, int64_t last, std::vector<uint32_t> members) {
    batch.member_lists.push_back(std::move(members));
    const std::vector<uint32_t>& list = batch.member_lists.back();
    for (; first < last; first += piece) {
      batch.pieces.push_back({first, std::min(last, first + piece), list.data(), static_cast<int64_t>(list.size())});
    }
  };
  if (!selection.has_ranges()) {
    std::vector<uint32_t> all(batch.queries);
    std::iota(all.begin(), all.end(), 0);
    return add(0, positions, std::move(all));
  }

  struct End {
    int64_t position;
    uint32_t query;
    bool opens;
  };
  std::vector<End> ends;
  for (int64_t query = 0; query < batch.queries; ++query) {
    for (const Range& range : ranges_of(selection, batch.first_query + query)) {
      ends.push_back({range.first, static_cast<uint32_t>(query), true});
      ends.push_back({range.last, static_cast<uint32_t>(query), false});
    }
  }
  std::sort(ends.begin(), ends.end(), [](const End& a, const End& b) { return a.position < b.position; });
  std::vector<uint32_t> open;
  int64_t position = 0;
  for (const End& end : ends) {
    if (position < end.position && !open.empty()) add(position, end.position, open);
    position = end.position;
    const auto place = std::lower_bound(open.begin(), open.end(), end.query);
    if (end.opens) {
      open.insert(place, end.query);
    } else {
      open.erase(place);
    }
  }
}

int Schedule::merge_threads(const Batch& batch) const {
  return batch.queries * k_ < results_worth_a_worker ? 1 : workers_;
}

}  // namespace fastembed::search
