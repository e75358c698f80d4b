// Attention with heads of any width, forward and backward, on bf16 or f16 tensor cores with float32 sums.
//
// A block of 8 warps holds 64 rows against 128 or 256 columns: their scores are made over all features, 64 at a time,
// and stay in registers; what becomes of them, in 16 bits, lies in shared memory; and the weighted sums of the columns'
// values are made 64 features at a time. So no head is too wide, and no score is in global memory. See
// docs/kernels/latent.md, and triton_kernels/latent.py for the same in Triton.
//
// Warp w has rows 16 (w % 4) .. and, of every product, the half w / 4 of its columns. With g = lane / 4 and t = lane %
// 4 a lane holds rows g and g + 8, columns 2 t and 2 t + 1 of each 16 x 8 operand.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "common/async_copy.cuh"
#include "common/device_dtype.cuh"
#include "common/device_reduce.cuh"
#include "common/launch_check.cuh"
#include "common/tensor_core.cuh"
#include "latent/latent_cuda.hpp"

namespace fastembed::latent::cuda {
namespace {

using device::warp_threads;

constexpr int rows = 64;
constexpr int chunk = 64;  // features
constexpr int warps = 8;
constexpr int threads = warps * warp_threads;
constexpr int row_warps = rows / 16;
constexpr int halves = warps / row_warps;
constexpr int buffers = 2;
constexpr int vector = device::vector_bytes / 2;  // elements
// Eight rows of a matrix begin in eight different banks, so ldmatrix has no conflict.
constexpr int padding = vector;
constexpr int pitch = chunk + padding;

__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  device::mma_bf16(d, a, b);
}
__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  device::mma_f16(d, a, b);
}
__device__ void round_to(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }
__device__ void round_to(float value, __half& to) { to = __float2half_rn(value); }

__device__ int lane() { return threadIdx.x % warp_threads; }
__device__ int warp_row() { return threadIdx.x / warp_threads % row_warps * 16; }
__device__ int half() { return threadIdx.x / warp_threads / row_warps; }
// The row of element i of an operand, less 16 (w % 4): g or g + 8.
__device__ int element_row(int i) { return lane() / 4 + i / 2 * 8; }
__device__ int element_column(int i) { return lane() % 4 * 2 + i % 2; }

template <int columns>
constexpr int weights_pitch = columns + padding;

// What lies in shared memory.
template <class T, int columns, int weight_matrices>
struct alignas(16) Shared {
  T left[buffers][rows * pitch];
  T right[buffers][columns * pitch];
  T weights[weight_matrices][rows * weights_pitch<columns>];
  float of_half[2][halves][rows];
  uint8_t row_inside[rows];
  uint8_t column_inside[columns];
};

// Scores of a lane: [operand][element], operands of 8 columns.
template <int columns>
using Block = float[columns / halves / 8][4];

// The rows of one matrix that a block reads: pointer to its first, and which of them there are.
template <class T>
struct Rows {
  const T* first;
  int64_t stride;
  int64_t features;
  const uint8_t* inside;

  // Starts copying features [feature, feature + 64) of `count` rows; zeros for what there is not.
  template <int count>
  __device__ void copy(T* target, int64_t feature) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < count * (chunk / vector); i += threads) {
      const int row = i / (chunk / vector);
      const int column = i % (chunk / vector) * vector;
      const int64_t left = features - feature - column;
      const bool wanted = inside[row] != 0 && left > 0;
      const T* const source = wanted ? first + row * stride + feature + column : first;
      device::copy_async<device::vector_bytes>(target + row * pitch + column, source,
                                               wanted ? static_cast<int>(min(left, int64_t{vector})) * 2 : 0);
    }
  }
};

template <class T>
__device__ Rows<T> rows_of(const Matrices& of, int64_t first, int64_t features, const uint8_t* inside) {
  const T* const head = static_cast<const T*>(of.data) + blockIdx.z * of.batch_stride + blockIdx.y * of.head_stride;
  return {head + first * of.stride, of.stride, features, inside};
}

// inside[i]: whether `first + i` is one of `count`, and kept. Barriers are the caller's.
__device__ void mark_inside(uint8_t* inside, int length, int64_t first, int64_t count, const Keep* keep) {
  for (int i = threadIdx.x; i < length; i += threads) {
    bool is = first + i < count;
    if (is && keep != nullptr && keep->data != nullptr) {
      is = keep->data[blockIdx.z * keep->batch_stride + (first + i) * keep->stride] != 0;
    }
    inside[i] = is;
  }
}

// scores = left right^T. Every thread of the block calls it; shared memory is free again afterwards.
template <class T, int columns, int matrices>
__device__ void products(const Rows<T>& left, const Rows<T>& right, Shared<T, columns, matrices>& shared,
                         Block<columns>& scores) {
#pragma unroll
  for (auto& operand : scores) {
#pragma unroll
    for (float& score : operand) score = 0.0f;
  }
  const auto start = [&](int64_t feature) {
    if (feature < left.features) {
      const int buffer = feature / chunk % buffers;
      left.template copy<rows>(shared.left[buffer], feature);
      right.template copy<columns>(shared.right[buffer], feature);
    }
    device::commit_copies();
  };
  start(0);
#pragma unroll 1
  for (int64_t feature = 0; feature < left.features; feature += chunk) {
    start(feature + chunk);
    device::wait_for_copies<1>();
    __syncthreads();
    const int buffer = feature / chunk % buffers;
    const T* const a_rows = shared.left[buffer] + (warp_row() + lane() % 16) * pitch + lane() / 16 * 8;
    const T* const b_rows = shared.right[buffer] +
                            (half() * (columns / halves) + lane() / 16 * 8 + lane() % 8) * pitch + lane() / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < chunk; k += 16) {
      uint32_t a[4];
      device::load_matrices(a, a_rows + k);
#pragma unroll
      for (int n = 0; n < columns / halves / 8; n += 2) {
        uint32_t b[4];
        device::load_matrices(b, b_rows + n * 8 * pitch + k);
        multiply(scores[n], a, {b[0], b[1]}, T());
        multiply(scores[n + 1], a, {b[2], b[3]}, T());
      }
    }
    __syncthreads();  // before the buffer is filled again
  }
  device::wait_for_copies<0>();
}

// Where the sums of a block's rows go: float32 if `partial`, contiguous.
struct Target {
  void* data;
  DType dtype;
  int64_t first;  // element of the first row
};

// out = weights right * factor + out * carried, without the last term if `is_first`, for the rows inside. factor and
// carried are those of the lane's rows g and g + 8. A thread adds to what it has written itself.
template <class T, int columns, int matrices>
__device__ void add_weighted(const T* weights, const Rows<T>& right, Shared<T, columns, matrices>& shared,
                             const Target& out, const float (&factor)[2], const float (&carried)[2], bool is_first) {
  constexpr int operands = chunk / halves / 8;
  const auto start = [&](int64_t feature) {
    if (feature < right.features) right.template copy<columns>(shared.right[feature / chunk % buffers], feature);
    device::commit_copies();
  };
  start(0);
#pragma unroll 1
  for (int64_t feature = 0; feature < right.features; feature += chunk) {
    start(feature + chunk);
    device::wait_for_copies<1>();
    __syncthreads();
    float sums[operands][4] = {};
    const T* const a_rows = weights + (warp_row() + lane() % 16) * weights_pitch<columns> + lane() / 16 * 8;
    const T* const b_rows =
        shared.right[feature / chunk % buffers] + lane() % 16 * pitch + half() * (chunk / halves) + lane() / 16 * 8;
#pragma unroll 4
    for (int k = 0; k < columns; k += 16) {
      uint32_t a[4];
      device::load_matrices(a, a_rows + k);
#pragma unroll
      for (int n = 0; n < operands; n += 2) {
        uint32_t b[4];
        device::load_matrices_transposed(b, b_rows + k * pitch + n * 8);
        multiply(sums[n], a, {b[0], b[1]}, T());
        multiply(sums[n + 1], a, {b[2], b[3]}, T());
      }
    }
#pragma unroll
    for (int n = 0; n < operands; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = warp_row() + element_row(i);
        const int64_t column = feature + half() * (chunk / halves) + n * 8 + element_column(i);
        if (shared.row_inside[row] == 0 || column >= right.features) continue;
        const int64_t index = out.first + row * right.features + column;
        float sum = sums[n][i] * factor[i / 2];
        if (!is_first) sum += device::load(out.data, out.dtype, index) * carried[i / 2];
        device::store(out.data, out.dtype, index, sum);
      }
    }
    __syncthreads();  // before the buffer is filled again
  }
  device::wait_for_copies<0>();
}

// The value of each of the lane's two rows, combined over the row's columns in all warps. `of_half` is not used again
// before the next barrier.
template <class Combine>
__device__ void combine_rows(float (&values)[2], float (&of_half)[halves][rows], Combine combine) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    values[r] = combine(values[r], __shfl_xor_sync(device::full_warp, values[r], 1));
    values[r] = combine(values[r], __shfl_xor_sync(device::full_warp, values[r], 2));
    if (lane() % 4 == 0) of_half[half()][warp_row() + element_row(2 * r)] = values[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = warp_row() + element_row(2 * r);
    values[r] = combine(of_half[0][row], of_half[1][row]);
  }
}

// A pair of neighbours of the weights, rounded.
template <class T, int columns>
__device__ void store_weights(T* weights, const Block<columns>& values) {
#pragma unroll
  for (int n = 0; n < columns / halves / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = half() * (columns / halves) + n * 8 + element_column(i);
      round_to(values[n][i], weights[(warp_row() + element_row(i)) * weights_pitch<columns> + column]);
    }
  }
}

// Grid: blocks of queries, heads, batch.
template <class T>
__global__ void __launch_bounds__(threads, 1)
    attend_rows(const __grid_constant__ Attention attention, void* out, DType out_dtype, float* lse) {
  constexpr int columns = forward_columns;
  extern __shared__ __align__(16) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<T, columns, 1>*>(memory);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows;
  const int64_t head = blockIdx.z * attention.heads + blockIdx.y;
  mark_inside(shared.row_inside, rows, first, attention.queries, nullptr);
  const Rows<T> query = rows_of<T>(attention.query, first, attention.features, shared.row_inside);
  const Target target{out, out_dtype, (head * attention.queries + first) * attention.value_features};

  float largest[2] = {-INFINITY, -INFINITY};
  float total[2] = {};
#pragma unroll 1
  for (int64_t block = 0; block < attention.keys; block += columns) {
    mark_inside(shared.column_inside, columns, block, attention.keys, &attention.keep);
    __syncthreads();
    Block<columns> scores;
    products(query, rows_of<T>(attention.key, block, attention.features, shared.column_inside), shared, scores);
    float newest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < columns / halves / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = half() * (columns / halves) + n * 8 + element_column(i);
        scores[n][i] = shared.column_inside[column] != 0 ? scores[n][i] * attention.scale : -INFINITY;
        newest[i / 2] = fmaxf(newest[i / 2], scores[n][i]);
      }
    }
    combine_rows(newest, shared.of_half[0], [](float a, float b) { return fmaxf(a, b); });
    float shrunk[2];
    float origin[2];
    float sum[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      newest[r] = fmaxf(newest[r], largest[r]);
      origin[r] = newest[r] == -INFINITY ? 0.0f : newest[r];
      shrunk[r] = expf(largest[r] - origin[r]);
      largest[r] = newest[r];
    }
#pragma unroll
    for (int n = 0; n < columns / halves / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = expf(scores[n][i] - origin[i / 2]);
        sum[i / 2] += scores[n][i];
      }
    }
    store_weights<T, columns>(shared.weights[0], scores);
    combine_rows(sum, shared.of_half[1], [](float a, float b) { return a + b; });
    float factor[2];
    float carried[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] = total[r] * shrunk[r] + sum[r];
      const bool is_last = block + columns >= attention.keys;
      factor[r] = !is_last ? 1.0f : total[r] == 0.0f ? 0.0f : 1.0f / total[r];
      carried[r] = shrunk[r] * factor[r];
    }
    const Rows<T> value = rows_of<T>(attention.value, block, attention.value_features, shared.column_inside);
    add_weighted(shared.weights[0], value, shared, target, factor, carried, block == 0);
    __syncthreads();  // before the marks are made anew
  }
  if (half() == 0 && lane() % 4 == 0) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row() + element_row(2 * r);
      if (shared.row_inside[row] == 0) continue;
      lse[head * attention.queries + first + row] = total[r] == 0.0f ? INFINITY : largest[r] + logf(total[r]);
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
  constexpr int columns = backward_columns;
  extern __shared__ __align__(16) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<T, columns, by_key ? 2 : 1>*>(memory);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows;
  const int64_t head = blockIdx.z * attention.heads + blockIdx.y;
  const int64_t features = attention.features;
  const int64_t value_features = attention.value_features;
  mark_inside(shared.row_inside, rows, first, row_side.count, &row_side.keep);
  const float one[2] = {1.0f, 1.0f};
  const float scale[2] = {attention.scale, attention.scale};
  const float* const of_head_lse = lse + head * attention.queries;
  const float* const of_head_deltas = deltas + head * attention.queries;
#pragma unroll 1
  for (int64_t block = 0; block < column_side.count; block += columns) {
    mark_inside(shared.column_inside, columns, block, column_side.count, &column_side.keep);
    __syncthreads();
    const Rows<T> score_columns = rows_of<T>(column_side.score, block, features, shared.column_inside);
    const Rows<T> slope_columns = rows_of<T>(column_side.slope, block, value_features, shared.column_inside);
    Block<columns> weights;
    products(rows_of<T>(row_side.score, first, features, shared.row_inside), score_columns, shared, weights);
    const auto inside = [&](int n, int i) {
      const int column = half() * (columns / halves) + n * 8 + element_column(i);
      return shared.row_inside[warp_row() + element_row(i)] != 0 && shared.column_inside[column] != 0;
    };
    const auto query_of = [&](int n, int i) {
      return by_key ? block + half() * (columns / halves) + n * 8 + element_column(i)
                    : first + warp_row() + element_row(i);
    };
#pragma unroll
    for (int n = 0; n < columns / halves / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[n][i] = inside(n, i) ? expf(weights[n][i] * attention.scale - of_head_lse[query_of(n, i)]) : 0.0f;
      }
    }
    if constexpr (by_key) store_weights<T, columns>(shared.weights[1], weights);
    Block<columns> slopes;
    products(rows_of<T>(row_side.slope, first, value_features, shared.row_inside), slope_columns, shared, slopes);
#pragma unroll
    for (int n = 0; n < columns / halves / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        slopes[n][i] = inside(n, i) ? weights[n][i] * (slopes[n][i] - of_head_deltas[query_of(n, i)]) : 0.0f;
      }
    }
    store_weights<T, columns>(shared.weights[0], slopes);
    const int64_t row = head * row_side.count + first;
    const Target score_grad{row_side.score_grad, out_dtype, row * features};
    add_weighted(shared.weights[0], score_columns, shared, score_grad, scale, one, block == 0);
    if constexpr (by_key) {
      const Target slope_grad{row_side.slope_grad, out_dtype, row * value_features};
      add_weighted(shared.weights[1], slope_columns, shared, slope_grad, one, one, block == 0);
    }
    __syncthreads();  // before the marks are made anew
  }
}

void allow_shared(const void* kernel, int bytes) {
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess) {
    fastembed::cuda::check_launch("latent_attention");
  }
}

dim3 grid_of(const Attention& attention, int64_t count) {
  const int64_t blocks = (count + rows - 1) / rows;
  if (blocks > INT32_MAX || attention.heads > UINT16_MAX || attention.batch > UINT16_MAX) {
    throw std::runtime_error("latent_attention: " + std::to_string(attention.batch) + " rows of " +
                             std::to_string(attention.heads) + " heads of " + std::to_string(count) +
                             " are more than one launch takes");
  }
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(attention.heads),
              static_cast<unsigned>(attention.batch));
}

DType result_dtype(const Attention& attention, int64_t columns, int most) {
  return columns <= most ? attention.dtype : DType::f32;
}

template <class T>
void attend_as(const Attention& attention, void* out, float* lse, cudaStream_t stream) {
  constexpr int bytes = sizeof(Shared<T, forward_columns, 1>);
  allow_shared(reinterpret_cast<const void*>(&attend_rows<T>), bytes);
  const dim3 grid = grid_of(attention, attention.queries);
  const DType out_dtype = result_dtype(attention, attention.keys, forward_columns);
  attend_rows<T><<<grid, threads, bytes, stream>>>(attention, out, out_dtype, lse);
  fastembed::cuda::check_launch("attend_rows");
}

template <class T, bool by_key>
void gradients_as(const Attention& attention, const Side& row_side, const Side& column_side, const float* lse,
                  const float* deltas, cudaStream_t stream) {
  constexpr int bytes = sizeof(Shared < T, backward_columns, by_key ? 2 : 1 >);
  allow_shared(reinterpret_cast<const void*>(&gradients<T, by_key>), bytes);
  const dim3 grid = grid_of(attention, row_side.count);
  const DType out_dtype = result_dtype(attention, column_side.count, backward_columns);
  gradients<T, by_key><<<grid, threads, bytes, stream>>>(attention, row_side, column_side, out_dtype, lse, deltas);
  fastembed::cuda::check_launch("gradients");
}

}  // namespace

void attend(const Attention& attention, void* out, float* lse, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (attention.dtype == DType::bf16) {
    attend_as<__nv_bfloat16>(attention, out, lse, stream);
  } else {
    attend_as<__half>(attention, out, lse, stream);
  }
}

void attend_backward(const Attention& attention, const Matrices& grad, const float* lse, const float* deltas,
                     void* query_grad, void* key_grad, void* value_grad, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const Side by_query{attention.query, grad, attention.queries, {}, query_grad, nullptr};
  const Side by_key{attention.key, attention.value, attention.keys, attention.keep, key_grad, value_grad};
  if (attention.dtype == DType::bf16) {
    gradients_as<__nv_bfloat16, false>(attention, by_query, by_key, lse, deltas, stream);
    gradients_as<__nv_bfloat16, true>(attention, by_key, by_query, lse, deltas, stream);
  } else {
    gradients_as<__half, false>(attention, by_query, by_key, lse, deltas, stream);
    gradients_as<__half, true>(attention, by_key, by_query, lse, deltas, stream);
  }
}

}  // namespace fastembed::latent::cuda
