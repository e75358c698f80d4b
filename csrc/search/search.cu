// Exact top-k over codes, in one pass over them. Each block meets a tile of queries with a slice of the codes, a chunk
// at a time: warps multiply, on tensor cores, rows of codes by queries (products.cuh) and turn the products into
// integer keys; then each warp looks after some of the queries, and appends what lies below the query's limit to a
// buffer. A full buffer is cut back to its k smallest, found by bisection (selection.cuh), and the largest of them
// becomes the limit: as codes come in the order of their ids, a strict comparison is all that ties need. The caller
// sorts what the slices leave.
//
// Everything is counted in integers: with c and c' the unsigned values of two codes,
//
//   Hamming   |c| + |c'| - 2 sum c c'                                       one bit per dimension
//   levels    v . v' = 4 sum c c' - 2 m (sum c + sum c') + dim m^2          v = 2 c - m, m = 2^bits - 1
//
// and sum c of the codes is one more product, with ones.
#include <algorithm>
#include <climits>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/device_reduce.cuh"
#include "common/divide_up.hpp"
#include "common/launch_check.cuh"
#include "search/products.cuh"
#include "search/search_cuda.hpp"
#include "search/selection.cuh"

namespace fastembed::search::cuda {
namespace {

constexpr int warps = 8;
constexpr int threads = warps * warp_threads;
constexpr int largest_chunk = 2 * operand_codes * warps;

// Blocks that keep a large device busy; of at least so many codes each.
constexpr int64_t blocks_wanted = 528;
constexpr int64_t fewest_codes = 2048;

struct Search : Operands {
  Filter filter;
  int64_t k;
  int64_t slice_codes;
  int64_t capacity;    // of a buffer
  Candidate* buffers;  // [slices, queries, capacity]
  int32_t* keys;       // [queries, slices, k]
  int32_t* ids;
};

// The score's bits as an integer that falls as the score rises.
__device__ inline int descending(float score) {
  const int bits = __float_as_int(score);
  return ~(bits ^ (bits >> 31 & INT_MAX));
}

__device__ inline int key_of(const Search& search, int dot, int code_sum, int query_sum, float code_norm,
                             float query_norm) {
  if (search.codes.inverse_norms == nullptr) return code_sum + query_sum - 2 * dot;
  const int m = (1 << search.metric.bits) - 1;
  const int product = 4 * dot - 2 * m * (code_sum + query_sum) + static_cast<int>(search.metric.dim) * m * m;
  return descending(static_cast<float>(product) * code_norm * query_norm);
}

__device__ inline bool is_allowed(const Search& search, int64_t query, int64_t id) {
  const Filter& filter = search.filter;
  if (filter.mask != nullptr && filter.mask[id] == 0) return false;
  if (filter.ranges_per_query < 0) return true;
  const int64_t* range = filter.ranges + query * filter.ranges_per_query * 2;
  for (int64_t i = 0; i < filter.ranges_per_query; ++i, range += 2) {
    if (id >= range[0] && id < range[1]) return true;
  }
  return false;
}

// Grid: slices, tiles of queries.
template <class Products, int query_operands>
__global__ void __launch_bounds__(threads, 1) find(const __grid_constant__ Search search) {
  constexpr int tile_queries = query_operands * operand_queries;
  constexpr int warp_codes = Products::code_operands * operand_codes;
  constexpr int chunk = warps * warp_codes;
  constexpr int pitch = chunk + 4;  // lanes t and t + 1 are two queries apart: in other banks
  __shared__ int keys[tile_queries * pitch];

  const int lane = lane_index();
  const int warp = threadIdx.x / warp_threads;
  const int64_t slice = blockIdx.x;
  const int64_t first_query = static_cast<int64_t>(blockIdx.y) * tile_queries;
  const int64_t begin = slice * search.slice_codes;
  const int64_t end = min(begin + search.slice_codes, search.codes.rows);
  const bool has_scores = search.codes.inverse_norms != nullptr;

  int query_sums[query_operands][2];
  float query_norms[query_operands][2];
  Tile<Products, query_operands> tile;
  multiply<Products, query_operands>(search, 0, 0, first_query, true, tile);
#pragma unroll
  for (int n = 0; n < query_operands; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t query = first_query + operand_queries * n + lane % 4 * 2 + j;
      query_sums[n][j] = tile.dots[0][n][j];
      query_norms[n][j] = has_scores && query < search.queries.rows ? search.queries.inverse_norms[query] : 0.0f;
    }
  }

  int counts[query_operands] = {};
  int limits[query_operands];
#pragma unroll
  for (int& limit : limits) limit = no_limit;
  const auto buffer_of = [&](int64_t query) {
    return search.buffers + (slice * search.queries.rows + query) * search.capacity;
  };

#pragma unroll 1
  for (int64_t first = begin; first < end; first += chunk) {
    const int64_t first_code = first + warp * warp_codes;
    multiply<Products, query_operands>(search, first_code, end, first_query, false, tile);
#pragma unroll
    for (int m = 0; m < Products::code_operands; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = operand_codes * m + 8 * half + lane / 4;
        const float norm = has_scores && first_code + row < end ? search.codes.inverse_norms[first_code + row] : 0.0f;
#pragma unroll
        for (int n = 0; n < query_operands; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            keys[(operand_queries * n + lane % 4 * 2 + j) * pitch + warp * warp_codes + row] =
                key_of(search, tile.dots[m][n][2 * half + j], tile.code_sums[m][2 * half], query_sums[n][j], norm,
                       query_norms[n][j]);
          }
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < query_operands; ++n) {
      const int64_t query = first_query + operand_queries * n + warp;
      if (query >= search.queries.rows) continue;
      Candidate* const buffer = buffer_of(query);
      if (counts[n] + chunk > search.capacity) {
        limits[n] = keep_smallest(buffer, counts[n], static_cast<int>(search.k));
        counts[n] = static_cast<int>(search.k);
      }
#pragma unroll 1
      for (int at = lane; at < chunk; at += warp_threads) {
        const int key = keys[(operand_queries * n + warp) * pitch + at];
        const int64_t id = first + at;
        const bool passes = id < end && key < limits[n] && is_allowed(search, query, id);
        const unsigned ballot = __ballot_sync(full_warp, passes);
        if (passes) buffer[counts[n] + lanes_before(ballot)] = {key, static_cast<int>(id)};
        counts[n] += __popc(ballot);
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int n = 0; n < query_operands; ++n) {
    const int64_t query = first_query + operand_queries * n + warp;
    if (query >= search.queries.rows) continue;
    Candidate* const buffer = buffer_of(query);
    if (counts[n] > search.k) {
      keep_smallest(buffer, counts[n], static_cast<int>(search.k));
      counts[n] = static_cast<int>(search.k);
    }
    __syncwarp();
    const int64_t row = (query * gridDim.x + slice) * search.k;
    for (int64_t i = lane; i < search.k; i += warp_threads) {
      const Candidate candidate = i < counts[n] ? buffer[i] : Candidate{no_limit, -1};
      search.keys[row + i] = candidate.key;
      search.ids[row + i] = candidate.id;
    }
  }
}

// --- launches

template <class Products, int query_operands>
void launch(const Search& search, int64_t slice_count, cudaStream_t stream) {
  const int64_t tiles = divide_up(search.queries.rows, query_operands * operand_queries);
  if (tiles > UINT16_MAX) {
    throw std::runtime_error("search: " + std::to_string(search.queries.rows) +
                             " queries are more than one launch takes");
  }
  const dim3 grid(static_cast<unsigned>(slice_count), static_cast<unsigned>(tiles));
  find<Products, query_operands><<<grid, threads, 0, stream>>>(search);
  fastembed::cuda::check_launch("find");
}

template <class Products>
void launch(const Search& search, int64_t slice_count, cudaStream_t stream) {
  if (search.queries.rows <= operand_queries) {
    launch<Products, 1>(search, slice_count, stream);
  } else {
    launch<Products, Products::many_queries>(search, slice_count, stream);
  }
}

int64_t capacity_for(int64_t k) { return 2 * k + largest_chunk; }

bool is_aligned(const Codes& codes, const Metric& metric) {
  return reinterpret_cast<uintptr_t>(codes.data) % piece_bytes == 0 && codes.stride % piece_bytes == 0 &&
         (metric.bits == 1 || metric.plane_bytes % piece_bytes == 0);
}

}  // namespace

int64_t slices(int64_t queries, int64_t codes, int64_t k) {
  const int64_t tiles =
      queries <= operand_queries ? 1 : divide_up(queries, BitProducts::many_queries * operand_queries);
  return std::max<int64_t>(1, std::min(divide_up(blocks_wanted, tiles), codes / std::max(fewest_codes, 4 * k)));
}

int64_t workspace_bytes(int64_t queries, int64_t codes, int64_t k) {
  return slices(queries, codes, k) * queries * capacity_for(k) * static_cast<int64_t>(sizeof(Candidate));
}

void find_candidates(const Codes& queries, const Codes& codes, const Metric& metric, const Filter& filter, int64_t k,
                     int32_t* keys, int32_t* ids, void* workspace, void* stream_handle) {
  if (queries.rows == 0) return;
  if (codes.rows > INT_MAX - largest_chunk || capacity_for(k) > INT_MAX) {
    throw std::runtime_error("search: " + std::to_string(codes.rows) + " codes are more than one launch takes");
  }
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t count = slices(queries.rows, codes.rows, k);
  const bool vectorised = is_aligned(queries, metric) && is_aligned(codes, metric);
  const Search search = {
      {queries, codes, metric, vectorised}, filter, k,  divide_up(codes.rows, count), capacity_for(k),
      static_cast<Candidate*>(workspace),   keys,   ids};
  if (metric.bits == 1 && metric.on_bit_products) return launch<BitProducts>(search, count, stream);
  switch (metric.bits) {
    case 1:
      return launch<ByteProducts<1>>(search, count, stream);
    case 2:
      return launch<ByteProducts<2>>(search, count, stream);
    case 3:
      return launch<ByteProducts<3>>(search, count, stream);
    default:
      return launch<ByteProducts<4>>(search, count, stream);
  }
}

}  // namespace fastembed::search::cuda
