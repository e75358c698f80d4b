#include <algorithm>
#include <cmath>
#include <vector>

#include "common/threading.hpp"
#include "search/search.hpp"

namespace fastembed::search {

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
  std::vector<Result> results(rows * count);
  parallel_for(rows, threads, [&](int64_t row) {
    const float* const query = queries + row * dim;
    Result* const mine = results.data() + row * count;
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
