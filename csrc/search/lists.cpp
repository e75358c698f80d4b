// Searches of inverted lists: which lists, then their codes, then ties by id.

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "search/search.hpp"

namespace fastembed::search {
namespace {

// Codes beyond those wanted that a search asks for, to see where the last tie ends.
constexpr int64_t beyond = 16;

Matrix rows_of(const Matrix& matrix, int64_t first, int64_t count) {
  return {matrix.data + first * matrix.stride, count, matrix.bytes, matrix.stride};
}

// `search(first, count, selection, k, values, rows)` searches for some queries, leaving ties to the smaller row;
// smaller values of `cost(value)` are better.
template <class Value, class Search, class Cost>
void topk(const InvertedLists& lists, int64_t queries, int64_t codes, const int64_t* probed, int64_t k, Value worst,
          Value* values, int64_t* rows, const Search& search, const Cost& cost) {
  const int64_t probes = lists.probes;
  std::vector<int64_t> ranges(queries * probes * 2);
  for (int64_t i = 0; i < queries * probes; ++i) {
    ranges[2 * i] = lists.starts[probed[i]];
    ranges[2 * i + 1] = lists.starts[probed[i] + 1];
  }
  const int64_t asked = std::min(k + beyond, codes);
  std::vector<Value> some_values(queries * asked), more_values(k);
  std::vector<int64_t> some_rows(queries * asked), more_rows(k);
  search(0, queries, Selection{nullptr, -1, ranges.data(), probes}, asked, some_values.data(), some_rows.data());

  struct Found {
    Value value;
    int64_t id, row;
  };
  std::vector<Found> found;
  const auto add = [&](const Value* of_rows, const int64_t* first, int64_t count) {
    for (int64_t i = 0; i < count && first[i] >= 0; ++i) found.push_back({of_rows[i], lists.ids[first[i]], first[i]});
  };
  for (int64_t query = 0; query < queries; ++query) {
    const Value* const of_query = some_values.data() + query * asked;
    const int64_t* const first = some_rows.data() + query * asked;
    found.clear();
    if (asked < codes && first[asked - 1] >= 0 && of_query[k - 1] == of_query[asked - 1]) {
      // The tie of the k-th code may reach further. Within a list ids ascend with rows.
      for (int64_t probe = 0; probe < probes; ++probe) {
        const int64_t* const range = ranges.data() + (query * probes + probe) * 2;
        search(query, 1, Selection{nullptr, -1, range, 1}, k, more_values.data(), more_rows.data());
        add(more_values.data(), more_rows.data(), k);
      }
    } else {
      add(of_query, first, asked);
    }
    std::sort(found.begin(), found.end(), [&](const Found& a, const Found& b) {
      return std::make_tuple(cost(a.value), a.id) < std::make_tuple(cost(b.value), b.id);
    });
    found.resize(k, Found{worst, -1, -1});
    for (int64_t rank = 0; rank < k; ++rank) {
      values[query * k + rank] = found[rank].value;
      rows[query * k + rank] = found[rank].row;
    }
  }
}

}  // namespace

void nearest_lists(const Matrix& queries, const Matrix& centroids, int64_t count, int64_t* lists, int threads) {
  std::vector<int32_t> distances(queries.rows * count);
  const Matrix signs = {queries.data, queries.rows, centroids.bytes, queries.stride};
  hamming_topk(signs, centroids, {nullptr, -1, nullptr, -1}, count, distances.data(), lists, threads);
}

void hamming_lists_topk(const Matrix& queries, const Matrix& codes, const InvertedLists& lists, const int64_t* probed,
                        int64_t k, int32_t* distances, int64_t* rows, int threads) {
  const auto search = [&](int64_t first, int64_t count, const Selection& selection, int64_t most, int32_t* values,
                          int64_t* found) {
    hamming_topk(rows_of(queries, first, count), codes, selection, most, values, found, threads);
  };
  topk(lists, queries.rows, codes.rows, probed, k, std::numeric_limits<int32_t>::max(), distances, rows, search,
       [](int32_t distance) { return distance; });
}

void sdc_lists_topk(const SdcMatrix& queries, const SdcMatrix& codes, const InvertedLists& lists, const int64_t* probed,
                    int64_t dim, int bits, int64_t k, float* scores, int64_t* rows, int threads) {
  const auto search = [&](int64_t first, int64_t count, const Selection& selection, int64_t most, float* values,
                          int64_t* found) {
    sdc_topk({rows_of(queries.codes, first, count), queries.inverse_norms + first}, codes, selection, dim, bits, most,
             values, found, threads);
  };
  topk(lists, queries.codes.rows, codes.codes.rows, probed, k, -std::numeric_limits<float>::infinity(), scores, rows,
       search, [](float score) { return -score; });
}

}  // namespace fastembed::search
