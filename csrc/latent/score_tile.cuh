// Blocks of scores on tensor cores, with operands of any width: what attention and its gradients share.
//
// A block of 8 warps holds rows against columns: their scores are made over all features, 128 bytes of each row at a
// time, and stay in registers; what becomes of them lies in shared memory; and the weighted sums of the columns' values
// are made 128 bytes at a time. So no head is too wide, and no score is in global memory. See docs/kernels/latent.md,
// and triton_kernels/latent.py for the same in Triton.
//
// The warps stand `row_warps` by `column_warps`: a warp has 16 rows and, of every product, one part of its columns.
// With g = lane / 4 and t = lane % 4 a lane holds rows g and g + 8, columns 2 t and 2 t + 1 of each 16 x 8 operand.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/async_copy.cuh"
#include "common/device_dtype.cuh"
#include "common/device_reduce.cuh"
#include "common/tensor_core.cuh"
#include "latent/latent_cuda.hpp"

namespace fastembed::latent::cuda {

using device::warp_threads;

constexpr int warps = 8;
constexpr int threads = warps * warp_threads;
constexpr int buffers = 2;
constexpr int depth = 16;  // features of one product

// How an element type is cut. Rows of a matrix begin in different banks: eight of them for ldmatrix, and for float32
// values, which it cannot transpose, four by eight neighbours.
template <class T>
struct Cut {
  static constexpr int rows = sizeof(T) == 2 ? rows_16_bit : rows_float32;
  static constexpr int chunk = 128 / sizeof(T);  // features
  static constexpr int vector = device::vector_bytes / sizeof(T);
  static constexpr int row_warps = rows / 16;
  static constexpr int column_warps = warps / row_warps;
  static constexpr int score_pitch = chunk + vector;
  static constexpr int value_pitch = chunk + 8;
  template <int columns>
  static constexpr int weights_pitch = columns + vector;
  // Scores of a lane: [operand][element], operands of 8 columns.
  template <int columns>
  using Block = float[columns / column_warps / 8][4];
};

// Operands of a product of 16 features: of 16 rows and of 8 columns. A float32 is the sum of three bf16, each the
// nearest to what the ones before it leave.
template <class T>
constexpr int split_parts = sizeof(T) == 2 ? 1 : 3;
template <class T>
struct Left {
  uint32_t parts[split_parts<T>][4];
};
template <class T>
struct Right {
  uint32_t parts[split_parts<T>][2];
};

// Two neighbours of an operand, in three registers.
template <int registers>
__device__ void split(uint32_t (&parts)[3][registers], int index, uint32_t first, uint32_t second) {
  float x = __uint_as_float(first);
  float y = __uint_as_float(second);
#pragma unroll
  for (auto& part : parts) {
    const __nv_bfloat162 nearest = __floats2bfloat162_rn(x, y);
    memcpy(&part[index], &nearest, sizeof(nearest));
    x -= __uint_as_float(part[index] << 16);
    y -= __uint_as_float(part[index] & 0xffff0000u);
  }
}

// Of 16 rows of which lane i names row i % 16, from feature `at` (lanes 0 to 15) or the next vector on. In which order
// the features of float32 come does not matter, so long as it is the same on both sides: a lane has t and t + 4 as
// neighbours, then t + 8 and t + 12.
template <class T>
__device__ void load_left(Left<T>& a, const T* at) {
  if constexpr (sizeof(T) == 2) {
    device::load_matrices(a.parts[0], at);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
      device::load_matrices(words, at + 8 * half);
      split(a.parts, 2 * half, words[0], words[2]);
      split(a.parts, 2 * half + 1, words[1], words[3]);
    }
  }
}

// Of two operands of 8 columns each, in rows of features.
template <class T>
__device__ void load_right(Right<T>& b, Right<T>& next, const T* at) {
  constexpr int halves = sizeof(T) / 2;
#pragma unroll
  for (int half = 0; half < halves; ++half) {
    uint32_t words[4];
    device::load_matrices(words, at + 8 * half);
    if constexpr (sizeof(T) == 2) {
      b.parts[0][0] = words[0];
      b.parts[0][1] = words[1];
      next.parts[0][0] = words[2];
      next.parts[0][1] = words[3];
    } else {
      split(b.parts, half, words[0], words[1]);
      split(next.parts, half, words[2], words[3]);
    }
  }
}

// Of operands of 8 columns each that lie side by side, in columns of features: 16 of them from `values` on.
template <class T, int operands>
__device__ void load_values(Right<T> (&b)[operands], const T* values) {
  constexpr int pitch = Cut<T>::value_pitch;
  const int lane = threadIdx.x % warp_threads;
  if constexpr (sizeof(T) == 2) {
    static_assert(operands % 2 == 0);
#pragma unroll
    for (int n = 0; n < operands; n += 2) {
      uint32_t words[4];
      device::load_matrices_transposed(words, values + lane % 16 * pitch + lane / 16 * 8 + n * 8);
      b[n].parts[0][0] = words[0];
      b[n].parts[0][1] = words[1];
      b[n + 1].parts[0][0] = words[2];
      b[n + 1].parts[0][1] = words[3];
    }
  } else {
#pragma unroll
    for (int n = 0; n < operands; ++n) {
      const T* const column = values + lane % 4 * pitch + n * 8 + lane / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const T* const at = column + 8 * half * pitch;
        split(b[n].parts, half, __float_as_uint(at[0]), __float_as_uint(at[4 * pitch]));
      }
    }
  }
}

__device__ inline void multiply(float (&d)[4], const Left<__nv_bfloat16>& a, const Right<__nv_bfloat16>& b) {
  device::mma_bf16(d, a.parts[0], b.parts[0]);
}
__device__ inline void multiply(float (&d)[4], const Left<__half>& a, const Right<__half>& b) {
  device::mma_f16(d, a.parts[0], b.parts[0]);
}
// The products of the parts from the least up; the three that are left out are below 2^-24 of the whole.
__device__ inline void multiply(float (&d)[4], const Left<float>& a, const Right<float>& b) {
#pragma unroll
  for (int order = 2; order >= 0; --order) {
#pragma unroll
    for (int part = 0; part <= order; ++part) device::mma_bf16(d, a.parts[part], b.parts[order - part]);
  }
}

__device__ inline int lane() { return threadIdx.x % warp_threads; }
template <class T>
__device__ int warp_row() {
  return threadIdx.x / warp_threads % Cut<T>::row_warps * 16;
}
template <class T>
__device__ int column_warp() {
  return threadIdx.x / warp_threads / Cut<T>::row_warps;
}
// The row of element i of an operand, less that of the warp: g or g + 8.
__device__ inline int element_row(int i) { return lane() / 4 + i / 2 * 8; }
__device__ inline int element_column(int i) { return lane() % 4 * 2 + i % 2; }
template <class T, int columns>
__device__ int block_column(int n, int i) {
  return column_warp<T>() * (columns / Cut<T>::column_warps) + n * 8 + element_column(i);
}

// What lies in shared memory: the weights of `parts` blocks of columns, or of one that has `parts` kinds of them.
template <class T, int columns_, int parts_>
struct alignas(16) Shared {
  static constexpr int columns = columns_;
  static constexpr int parts = parts_;
  using Cut = cuda::Cut<T>;
  T left[buffers][Cut::rows * Cut::score_pitch];
  T right[buffers][columns * Cut::value_pitch];
  T weights[parts][Cut::rows * Cut::template weights_pitch<columns>];
  float of_warp[2][Cut::column_warps][Cut::rows];
  float factors[parts][Cut::rows];
  uint8_t row_inside[Cut::rows];
  uint8_t column_inside[parts * columns];
};

// The rows of one matrix that a block reads: pointer to its first, and which of them there are.
template <class T>
struct Rows {
  const T* first;
  int64_t stride;
  int64_t features;
  const uint8_t* inside;

  __device__ Rows from(int row) const { return {first + row * stride, stride, features, inside + row}; }

  // Starts copying a chunk of `count` rows from `feature` on; zeros for what there is not.
  template <int count, int pitch>
  __device__ void copy(T* target, int64_t feature) const {
    constexpr int vector = Cut<T>::vector;
    constexpr int vectors = Cut<T>::chunk / vector;
#pragma unroll 1
    for (int i = threadIdx.x; i < count * vectors; i += threads) {
      const int row = i / vectors;
      const int column = i % vectors * vector;
      const int64_t left = features - feature - column;
      const bool wanted = inside[row] != 0 && left > 0;
      const T* const source = wanted ? first + row * stride + feature + column : first;
      const int elements = wanted ? static_cast<int>(min(left, int64_t{vector})) : 0;
      device::copy_async<device::vector_bytes>(target + row * pitch + column, source,
                                               elements * static_cast<int>(sizeof(T)));
    }
  }
};

template <class T>
__device__ Rows<T> rows_of(const Matrices& of, int64_t head, int64_t first, int64_t features, const uint8_t* inside) {
  const T* const data = static_cast<const T*>(of.data) + blockIdx.z * of.batch_stride + head * of.head_stride;
  return {data + first * of.stride, of.stride, features, inside};
}

__device__ inline bool is_kept(const Keep& keep, int64_t key) {
  return keep.data == nullptr || keep.data[blockIdx.z * keep.batch_stride + key * keep.stride] != 0;
}

// inside[i]: whether `first + i` is before `end`, and kept. Barriers are the caller's.
__device__ inline void mark_inside(uint8_t* inside, int length, int64_t first, int64_t end, const Keep& keep) {
  for (int i = threadIdx.x; i < length; i += threads) inside[i] = first + i < end && is_kept(keep, first + i);
}

struct Span {
  int64_t begin;
  int64_t end;
};

// From the first key that is kept to behind the last; nothing lies between where none is kept. So what is padded at
// either side is not read, and does not move the blocks of the others.
__device__ inline Span kept_span(const Keep& keep, int64_t keys) {
  if (keep.data == nullptr) return {0, keys};
  Span span{keys, 0};
  for (int64_t key = threadIdx.x; key < keys; key += threads) {
    if (!is_kept(keep, key)) continue;
    span.begin = min(span.begin, key);
    span.end = key + 1;
  }
  return {device::block_reduce<threads>(span.begin, keys, [](int64_t a, int64_t b) { return min(a, b); }),
          device::block_reduce<threads>(span.end, int64_t{0}, [](int64_t a, int64_t b) { return max(a, b); })};
}

// scores = left right^T. Every thread of the block calls it; shared memory is free again afterwards.
template <class T, class Memory>
__device__ void products(const Rows<T>& left, const Rows<T>& right, Memory& shared,
                         typename Cut<T>::template Block<Memory::columns>& scores) {
  using Cut = cuda::Cut<T>;
  constexpr int columns = Memory::columns;
  constexpr int pitch = Cut::score_pitch;
#pragma unroll
  for (auto& operand : scores) {
#pragma unroll
    for (float& score : operand) score = 0.0f;
  }
  const auto start = [&](int64_t feature) {
    if (feature < left.features) {
      const int buffer = feature / Cut::chunk % buffers;
      left.template copy<Cut::rows, pitch>(shared.left[buffer], feature);
      right.template copy<columns, pitch>(shared.right[buffer], feature);
    }
    device::commit_copies();
  };
  start(0);
#pragma unroll 1
  for (int64_t feature = 0; feature < left.features; feature += Cut::chunk) {
    start(feature + Cut::chunk);
    device::wait_for_copies<1>();
    __syncthreads();
    const int buffer = feature / Cut::chunk % buffers;
    const int column = column_warp<T>() * (columns / Cut::column_warps) + lane() / 16 * 8 + lane() % 8;
    const T* const a_rows = shared.left[buffer] + (warp_row<T>() + lane() % 16) * pitch + lane() / 16 * Cut::vector;
    const T* const b_rows = shared.right[buffer] + column * pitch + lane() / 8 % 2 * Cut::vector;
#pragma unroll
    for (int k = 0; k < Cut::chunk; k += depth) {
      Left<T> a;
      load_left(a, a_rows + k);
#pragma unroll
      for (int n = 0; n < columns / Cut::column_warps / 8; n += 2) {
        Right<T> b[2];
        load_right(b[0], b[1], b_rows + n * 8 * pitch + k);
        multiply(scores[n], a, b[0]);
        multiply(scores[n + 1], a, b[1]);
      }
    }
    __syncthreads();  // before the buffer is filled again
  }
  device::wait_for_copies<0>();
}

// Where the sums of a block's rows go, contiguous.
struct Target {
  void* data;
  DType dtype;
  int64_t first;  // element of the first row
};

// out = the sum over `parts` of weights * factor(part, r) right + out * carried, without the last term if `is_first`,
// for the rows inside. weights: of each part, one after the other; right: rows of the parts, likewise; factor and
// carried: of the lane's rows g (r = 0) and g + 8. A thread adds to what it has written itself.
template <class T, class Memory, class Factor>
__device__ void add_weighted(const T* weights, int parts, const Rows<T>& right, Memory& shared, const Target& out,
                             Factor factor, const float (&carried)[2], bool is_first) {
  using Cut = cuda::Cut<T>;
  constexpr int columns = Memory::columns;
  constexpr int weights_pitch = Cut::template weights_pitch<columns>;
  constexpr int warp_columns = Cut::chunk / Cut::column_warps;
  constexpr int operands = warp_columns / 8;
  const auto start = [&](int64_t feature, int part, int buffer) {
    if (feature < right.features) {
      right.from(part * columns).template copy<columns, Cut::value_pitch>(shared.right[buffer], feature);
    }
    device::commit_copies();
  };
  float sums[operands][4];
  int buffer = 0;
  start(0, 0, buffer);
#pragma unroll 1
  for (int64_t feature = 0; feature < right.features; feature += Cut::chunk) {
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      const bool is_last = part == parts - 1;
      start(is_last ? feature + Cut::chunk : feature, is_last ? 0 : part + 1, 1 - buffer);
      device::wait_for_copies<1>();
      __syncthreads();
      float added[operands][4] = {};
      const T* const a_rows = weights + part * Cut::rows * weights_pitch +
                              (warp_row<T>() + lane() % 16) * weights_pitch + lane() / 16 * Cut::vector;
      const T* const b_rows = shared.right[buffer] + column_warp<T>() * warp_columns;
#pragma unroll 4
      for (int k = 0; k < columns; k += depth) {
        Left<T> a;
        Right<T> b[operands];
        load_left(a, a_rows + k);
        load_values(b, b_rows + k * Cut::value_pitch);
#pragma unroll
        for (int n = 0; n < operands; ++n) multiply(added[n], a, b[n]);
      }
#pragma unroll
      for (int n = 0; n < operands; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float before = part == 0 ? 0.0f : sums[n][i];
          sums[n][i] = before + added[n][i] * factor(part, i / 2);
        }
      }
      buffer = 1 - buffer;
      __syncthreads();  // before the buffer is filled again
    }
#pragma unroll
    for (int n = 0; n < operands; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = warp_row<T>() + element_row(i);
        const int64_t column = feature + column_warp<T>() * warp_columns + n * 8 + element_column(i);
        if (shared.row_inside[row] == 0 || column >= right.features) continue;
        const int64_t index = out.first + row * right.features + column;
        float sum = sums[n][i];
        if (!is_first) sum += device::load(out.data, out.dtype, index) * carried[i / 2];
        device::store(out.data, out.dtype, index, sum);
      }
    }
  }
  device::wait_for_copies<0>();
}

// The value of each of the lane's two rows, combined over the row's columns in all warps. `of_warp` is not used again
// before the next barrier.
template <class T, class Combine>
__device__ void combine_rows(float (&values)[2], float (&of_warp)[Cut<T>::column_warps][Cut<T>::rows],
                             Combine combine) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    values[r] = combine(values[r], __shfl_xor_sync(device::full_warp, values[r], 1));
    values[r] = combine(values[r], __shfl_xor_sync(device::full_warp, values[r], 2));
    if (lane() % 4 == 0) of_warp[column_warp<T>()][warp_row<T>() + element_row(2 * r)] = values[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = warp_row<T>() + element_row(2 * r);
    values[r] = of_warp[0][row];
#pragma unroll
    for (int w = 1; w < Cut<T>::column_warps; ++w) values[r] = combine(values[r], of_warp[w][row]);
  }
}

template <class T, int columns>
__device__ void store_weights(T* weights, const typename Cut<T>::template Block<columns>& values) {
#pragma unroll
  for (int n = 0; n < columns / Cut<T>::column_warps / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = warp_row<T>() + element_row(i);
      weights[row * Cut<T>::template weights_pitch<columns> + block_column<T, columns>(n, i)] =
          device::from_float<T>(values[n][i]);
    }
  }
}

}  // namespace fastembed::latent::cuda
