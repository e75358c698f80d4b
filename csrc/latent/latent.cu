// Attention with heads of any width, forward and backward, and the folded heads of latent pooling, whose sums are added
// up. See score_tile.cuh for the blocks that all of it is made of.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "common/launch_check.cuh"
#include "latent/score_tile.cuh"

namespace fastembed::latent::cuda {
namespace {

// Each time keys are gone through, that many blocks of them keep their weights, so that the sums of all are made before
// they are written. A block has many columns, or few where a device has little shared memory.
constexpr int forward_parts = 2;
constexpr int many_columns = 256;
constexpr int few_columns = 128;

// Grid: blocks of queries, groups of heads, batch.
template <class T, int columns>
__global__ void __launch_bounds__(threads, 1)
    attend_rows(const __grid_constant__ Attention attention, void* out, DType out_dtype, float* lse) {
  using Cut = cuda::Cut<T>;
  constexpr int all_columns = forward_parts * columns;
  constexpr int operands = columns / Cut::column_warps / 8;
  extern __shared__ __align__(16) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<T, columns, forward_parts>*>(memory);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Cut::rows;
  const int64_t group = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  const Target target{out, out_dtype, (group * attention.queries + first) * attention.value_features};
  mark_inside(shared.row_inside, Cut::rows, first, attention.queries, Keep{});
  const Span span = kept_span(attention.keep, attention.keys);
  const bool writes_rows = column_warp<T>() == 0 && lane() % 4 == 0;

  const int64_t first_head = blockIdx.y * attention.heads_each;
  const int64_t end_head = min(first_head + attention.heads_each, attention.heads);
#pragma unroll 1
  for (int64_t head = first_head; head < end_head; ++head) {
    const Rows<T> query = rows_of<T>(attention.query, head, first, attention.features, shared.row_inside);
    float largest[2] = {-INFINITY, -INFINITY};
    float total[2] = {};
#pragma unroll 1
    for (int64_t block = span.begin; block < span.end; block += all_columns) {
      mark_inside(shared.column_inside, all_columns, block, span.end, attention.keep);
      __syncthreads();
      const Rows<T> key = rows_of<T>(attention.key, head, block, attention.features, shared.column_inside);
      const float before[2] = {largest[0], largest[1]};
      const int parts = span.end - block > columns ? forward_parts : 1;
#pragma unroll 1
      for (int part = 0; part < parts; ++part) {
        typename Cut::template Block<columns> scores;
        products(query, key.from(part * columns), shared, scores);
        float newest[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int n = 0; n < operands; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = part * columns + block_column<T, columns>(n, i);
            float score = -INFINITY;
            if (shared.column_inside[column] != 0) {
              score = scores[n][i] * attention.scale;
              if (attention.bias != nullptr) score += attention.bias[head * attention.keys + block + column];
            }
            scores[n][i] = score;
            newest[i / 2] = fmaxf(newest[i / 2], score);
          }
        }
        combine_rows<T>(newest, shared.of_warp[0], [](float a, float b) { return fmaxf(a, b); });
        float origin[2];
        float sum[2] = {};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          newest[r] = fmaxf(newest[r], largest[r]);
          origin[r] = newest[r] == -INFINITY ? 0.0f : newest[r];
          total[r] *= expf(largest[r] - origin[r]);
          largest[r] = newest[r];
          if (writes_rows) shared.factors[part][warp_row<T>() + element_row(2 * r)] = largest[r];
        }
#pragma unroll
        for (int n = 0; n < operands; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            scores[n][i] = expf(scores[n][i] - origin[i / 2]);
            sum[i / 2] += scores[n][i];
          }
        }
        store_weights<T, columns>(shared.weights[part], scores);
        combine_rows<T>(sum, shared.of_warp[1], [](float a, float b) { return a + b; });
#pragma unroll
        for (int r = 0; r < 2; ++r) total[r] += sum[r];
      }
      // The last block divides by the sum; what other heads left is whole already.
      const bool is_last = block + all_columns >= span.end;
      float carried[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float origin = largest[r] == -INFINITY ? 0.0f : largest[r];
        const float divided = !is_last ? 1.0f : total[r] == 0.0f ? 0.0f : 1.0f / total[r];
        carried[r] = block == span.begin ? 1.0f : expf(before[r] - origin) * divided;
        if (!writes_rows) continue;
        for (int part = 0; part < parts; ++part) {
          float& factor = shared.factors[part][warp_row<T>() + element_row(2 * r)];
          factor = expf(factor - origin) * divided;
        }
      }
      const Rows<T> value = rows_of<T>(attention.value, head, block, attention.value_features, shared.column_inside);
      const auto factor = [&](int part, int r) { return shared.factors[part][warp_row<T>() + element_row(2 * r)]; };
      const bool is_first = block == span.begin && head == first_head;
      add_weighted(shared.weights[0], parts, value, shared, target, factor, carried, is_first);
      __syncthreads();  // before the marks are made anew
    }
    if (lse != nullptr && writes_rows) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = warp_row<T>() + element_row(2 * r);
        if (shared.row_inside[row] == 0) continue;
        const int64_t index = (blockIdx.z * attention.heads + head) * attention.queries + first + row;
        lse[index] = total[r] == 0.0f ? INFINITY : largest[r] + logf(total[r]);
      }
    }
  }
}

// What the rows of the backward are, and their columns: queries and keys, or the other way around. The first of each
// make scores, the second the slopes of the probabilities.
struct Side {
  Matrices score;
  Matrices slope;
  int64_t count;
  Keep keep;
  void* score_grad;
  void* slope_grad;
};

// With P = exp(scale * scores - lse) and dS = P (slopes - deltas), rows by columns: the gradient of the rows' first
// matrices is scale * dS times the columns' first; by_key, that of their second is P times the columns' second.
// Grid: blocks of rows, heads, batch.
template <class T, bool by_key>
__global__ void __launch_bounds__(threads, 1)
    gradients(const __grid_constant__ Attention attention, const __grid_constant__ Side row_side,
              const __grid_constant__ Side column_side, DType out_dtype, const float* lse, const float* deltas) {
  using Cut = cuda::Cut<T>;
  constexpr int columns = backward_columns;
  constexpr int operands = columns / Cut::column_warps / 8;
  extern __shared__ __align__(16) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<T, columns, by_key ? 2 : 1>*>(memory);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Cut::rows;
  const int64_t head = blockIdx.z * attention.heads + blockIdx.y;
  const int64_t features = attention.features;
  const int64_t value_features = attention.value_features;
  mark_inside(shared.row_inside, Cut::rows, first, row_side.count, row_side.keep);
  __syncthreads();
  if (by_key && __syncthreads_or(threadIdx.x < Cut::rows && shared.row_inside[threadIdx.x] != 0) == 0) return;
  const Span span = kept_span(column_side.keep, column_side.count);
  const float one[2] = {1.0f, 1.0f};
  const float* const of_head_lse = lse + head * attention.queries;
  const float* const of_head_deltas = deltas + head * attention.queries;
#pragma unroll 1
  for (int64_t block = span.begin; block < span.end; block += columns) {
    mark_inside(shared.column_inside, columns, block, span.end, column_side.keep);
    __syncthreads();
    const auto rows = [&](const Matrices& of, int64_t from, int64_t width, const uint8_t* inside) {
      return rows_of<T>(of, blockIdx.y, from, width, inside);
    };
    const Rows<T> score_columns = rows(column_side.score, block, features, shared.column_inside);
    const Rows<T> slope_columns = rows(column_side.slope, block, value_features, shared.column_inside);
    typename Cut::template Block<columns> weights;
    products(rows(row_side.score, first, features, shared.row_inside), score_columns, shared, weights);
    const auto inside = [&](int n, int i) {
      return shared.row_inside[warp_row<T>() + element_row(i)] != 0 &&
             shared.column_inside[block_column<T, columns>(n, i)] != 0;
    };
    const auto query_of = [&](int n, int i) {
      return by_key ? block + block_column<T, columns>(n, i) : first + warp_row<T>() + element_row(i);
    };
#pragma unroll
    for (int n = 0; n < operands; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[n][i] = inside(n, i) ? expf(weights[n][i] * attention.scale - of_head_lse[query_of(n, i)]) : 0.0f;
      }
    }
    if constexpr (by_key) store_weights<T, columns>(shared.weights[1], weights);
    typename Cut::template Block<columns> slopes;
    products(rows(row_side.slope, first, value_features, shared.row_inside), slope_columns, shared, slopes);
#pragma unroll
    for (int n = 0; n < operands; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        slopes[n][i] = inside(n, i) ? weights[n][i] * (slopes[n][i] - of_head_deltas[query_of(n, i)]) : 0.0f;
      }
    }
    store_weights<T, columns>(shared.weights[0], slopes);
    const int64_t row = head * row_side.count + first;
    const bool is_first = block == span.begin;
    const Target score_grad{row_side.score_grad, out_dtype, row * features};
    const auto scale = [&](int, int) { return attention.scale; };
    add_weighted(shared.weights[0], 1, score_columns, shared, score_grad, scale, one, is_first);
    if constexpr (by_key) {
      const Target slope_grad{row_side.slope_grad, out_dtype, row * value_features};
      const auto whole = [](int, int) { return 1.0f; };
      add_weighted(shared.weights[1], 1, slope_columns, shared, slope_grad, whole, one, is_first);
    }
    __syncthreads();  // before the marks are made anew
  }
}

// Shared memory that a block may have on sm_80, and the least on what its code runs on (8.6), less what the reductions
// have.
constexpr int most_shared = 162 * 1024;
constexpr int least_shared = 98 * 1024;

void allow_shared(const void* kernel, int bytes) {
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess) {
    fastembed::cuda::check_launch("latent_attention");
  }
}

template <class T>
dim3 grid_of(const Attention& attention, int64_t count, int64_t groups) {
  const int64_t blocks = (count + Cut<T>::rows - 1) / Cut<T>::rows;
  if (blocks > INT32_MAX || groups > UINT16_MAX || attention.batch > UINT16_MAX) {
    throw std::runtime_error("latent_attention: " + std::to_string(attention.batch) + " rows of " +
                             std::to_string(groups) + " heads of " + std::to_string(count) +
                             " are more than one launch takes");
  }
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(groups), static_cast<unsigned>(attention.batch));
}

DType result_dtype(const Attention& attention, int64_t columns, int most) {
  return columns <= most ? attention.dtype : DType::f32;
}

// Calls `function` with a value of the element type.
template <class Function>
void with_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::f32:
      return function(float());
    case DType::bf16:
      return function(__nv_bfloat16());
    case DType::f16:
      return function(__half());
  }
}

template <class T, int columns>
void attend_as(const Attention& attention, void* out, DType out_dtype, float* lse, cudaStream_t stream) {
  constexpr int bytes = sizeof(Shared<T, columns, forward_parts>);
  static_assert(bytes <= (columns == few_columns ? least_shared : most_shared));
  allow_shared(reinterpret_cast<const void*>(&attend_rows<T, columns>), bytes);
  const int64_t groups = (attention.heads + attention.heads_each - 1) / attention.heads_each;
  const dim3 grid = grid_of<T>(attention, attention.queries, groups);
  attend_rows<T, columns><<<grid, threads, bytes, stream>>>(attention, out, out_dtype, lse);
  fastembed::cuda::check_launch("attend_rows");
}

void attend_as(const Attention& attention, void* out, DType out_dtype, float* lse, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  with_type(attention.dtype, [&](auto type) {
    using T = decltype(type);
    if (forward_columns() == forward_parts * many_columns) {
      attend_as<T, many_columns>(attention, out, out_dtype, lse, stream);
    } else {
      attend_as<T, few_columns>(attention, out, out_dtype, lse, stream);
    }
  });
}

template <class T, bool by_key>
void gradients_as(const Attention& attention, const Side& row_side, const Side& column_side, const float* lse,
                  const float* deltas, cudaStream_t stream) {
  constexpr int bytes = sizeof(Shared < T, backward_columns, by_key ? 2 : 1 >);
  static_assert(bytes <= least_shared);
  allow_shared(reinterpret_cast<const void*>(&gradients<T, by_key>), bytes);
  const dim3 grid = grid_of<T>(attention, row_side.count, attention.heads);
  const DType out_dtype = result_dtype(attention, column_side.count, backward_columns);
  gradients<T, by_key><<<grid, threads, bytes, stream>>>(attention, row_side, column_side, out_dtype, lse, deltas);
  fastembed::cuda::check_launch("gradients");
}

}  // namespace

int forward_columns() {
  int device = 0;
  int bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
    fastembed::cuda::check_launch("latent_attention");
  }
  return forward_parts * (bytes >= most_shared ? many_columns : few_columns);
}

void attend(const Attention& attention, void* out, float* lse, void* stream) {
  attend_as(attention, out, result_dtype(attention, attention.keys, forward_columns()), lse, stream);
}

void attend_folded(const Attention& attention, float* out, void* stream) {
  attend_as(attention, out, DType::f32, nullptr, stream);
}

void attend_backward(const Attention& attention, const Matrices& grad, const float* lse, const float* deltas,
                     void* query_grad, void* key_grad, void* value_grad, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const Side by_query{attention.query, grad, attention.queries, {}, query_grad, nullptr};
  const Side by_key{attention.key, attention.value, attention.keys, attention.keep, key_grad, value_grad};
  with_type(attention.dtype, [&](auto type) {
    gradients_as<decltype(type), false>(attention, by_query, by_key, lse, deltas, stream);
    gradients_as<decltype(type), true>(attention, by_key, by_query, lse, deltas, stream);
  });
}

}  // namespace fastembed::latent::cuda
