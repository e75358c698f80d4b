// Asynchronous copies and tensor-core products: a correct program, or, given the name of a bug, the same program with
// that one bug. Prints and returns what samples.cu does.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/async_copy.cuh"
#include "common/tensor_core.cuh"

namespace device = fastembed::device;

#define BUGS(X)                                                                                           \
  X(none)                                                                                                 \
  X(missing_wait)           /* a tile is read while its copy may be under way */                          \
  X(wait_for_too_few)       /* the wait leaves the group that is needed next under way */                 \
  X(missing_commit)         /* the copies belong to no group that is waited for */                        \
  X(barrier_before_wait)    /* other threads' copies are not waited for */                                \
  X(missing_barrier)        /* likewise, with no barrier at all */                                        \
  X(overwritten_while_read) /* the next copy into a buffer starts while it is read */                     \
  X(missing_zero_fill)      /* what lies past the end is read */                                          \
  X(misaligned_copy)        /* 16 bytes from an address that is a multiple of 4 */                        \
  X(swapped_a_registers)    /* rows 8 to 15 taken for the second half of K */                             \
  X(wrong_b_column)         /* lane % 8 taken for lane / 4 */                                             \
  X(transposed_result)      /* d[1] taken for the next row */                                             \
  X(wrong_matrix_order)     /* ldmatrix: matrices 1 and 2 exchanged */                                    \
  X(untransposed_rows)      /* ldmatrix.trans: row lane / 4 taken for rows 2 * (lane % 4) and the next */ \
  X(misaligned_row)         /* ldmatrix: a row off by 4 bytes */                                          \
  X(mma_in_branch)          /* half of the warp */

#define ENUMERATOR(name) name,
enum Bug { BUGS(ENUMERATOR) };
#define STRING(name) #name,
const char* const bug_names[] = {BUGS(STRING)};

// --- asynchronous copies: sums over tiles of a double-buffered pipeline, each thread reading what another copied ---

constexpr int threads = 64;
constexpr int per_thread = 4;
constexpr int tile = threads * per_thread;
constexpr int tiles = 5;
constexpr int count = tiles * tile - 6;  // the last copy is cut

__device__ void start_tile(const int* values, int index, int (&buffer)[tile], Bug bug) {
  const int first = index * tile + static_cast<int>(threadIdx.x) * per_thread;
  const int left = count - first < 0 ? 0 : count - first;
  int valid_bytes = 4 * (left < per_thread ? left : per_thread);
  if (bug == missing_zero_fill) valid_bytes = 16;
  const int shift = bug == misaligned_copy ? 1 : 0;
  device::copy_async<16>(&buffer[threadIdx.x * per_thread], values + (left > 0 ? first : 0) + shift, valid_bytes);
}

__global__ void sum_tiles(const int* values, int* sums, Bug bug) {
  __shared__ alignas(16) int buffers[2][tile];
  start_tile(values, 0, buffers[0], bug);
  device::commit_copies();
  int sum = 0;
  for (int index = 0; index < tiles; ++index) {
    if (index + 1 < tiles) start_tile(values, index + 1, buffers[(index + 1) % 2], bug);
    if (bug != missing_commit) device::commit_copies();
    if (bug == barrier_before_wait) __syncthreads();
    if (bug == wait_for_too_few) device::wait_for_copies<2>();
    if (bug != missing_wait && bug != wait_for_too_few) device::wait_for_copies<1>();
    if (bug != missing_barrier && bug != barrier_before_wait) __syncthreads();
    const int neighbour = (threadIdx.x + 37) % threads;
    for (int i = 0; i < per_thread; ++i) sum += (index + 1) * buffers[index % 2][neighbour * per_thread + i];
    if (bug != overwritten_while_read) __syncthreads();
  }
  sums[threadIdx.x] = sum;
}

// --- products: fragments filled by the formulas of the PTX ISA, "Matrix Fragments for mma.m16n8k16 / k32 / k256" ---

struct Position {
  int row;
  int column;
};

// Element i of a lane's registers a, for 2, 4 or 32 elements in each: a_i with i < per, 2 per <= i < 3 per is in row
// groupID, else in groupID + 8; the second half of i stands 4 per columns on.
__host__ __device__ Position a_position(int lane, int i, int per, Bug bug) {
  const int group = lane >> 2;
  const int thread = lane % 4;
  bool upper = i < per || (i >= 2 * per && i < 3 * per);
  bool left = i < 2 * per;
  if (bug == swapped_a_registers) {
    const bool was_upper = upper;
    upper = left;
    left = was_upper;
  }
  return {upper ? group : group + 8, thread * per + i % per + (left ? 0 : 4 * per)};
}

// b_i: row (threadID_in_group * per) + i % per, 4 per further for i >= per; column groupID.
__host__ __device__ Position b_position(int lane, int i, int per, Bug bug) {
  return {lane % 4 * per + i % per + (i >= per ? 4 * per : 0), bug == wrong_b_column ? lane % 8 : lane >> 2};
}

// c_i: row groupID for i < 2, else groupID + 8; column threadID_in_group * 2 + (i & 1).
__host__ __device__ Position c_position(int lane, int i, Bug bug) {
  if (bug == transposed_result) return {lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8), lane >> 2};
  return {i < 2 ? lane >> 2 : (lane >> 2) + 8, lane % 4 * 2 + (i & 1)};
}

enum Kind { s8_s8, u8_s8, s8_u8, bf16, f16, b1_xor, b1_and, kinds };
__host__ __device__ int bits_of(int kind) { return kind < bf16 ? 8 : kind < b1_xor ? 16 : 1; }

// A [16][K] and B [8][K], elements of `bits` bits one after the other; D [16][8] is added to.
__global__ void multiply(int kind, const uint32_t* a_matrix, const uint32_t* b_matrix, float* d_matrix, Bug bug) {
  const int lane = threadIdx.x;
  const int bits = bits_of(kind);
  const int per = 32 / bits;
  const int words = 8;  // of a row
  uint32_t a[4];
  uint32_t b[2];
  for (int r = 0; r < 4; ++r) {
    const Position at = a_position(lane, r * per, per, bug);
    a[r] = a_matrix[at.row * words + at.column / per];
  }
  for (int r = 0; r < 2; ++r) {
    const Position at = b_position(lane, r * per, per, bug);
    b[r] = b_matrix[at.column * words + at.row / per];
  }
  if (bug == mma_in_branch && lane >= 16) return;
  int sums[4];
  float float_sums[4];
  for (int i = 0; i < 4; ++i) {
    const Position at = c_position(lane, i, bug);
    float_sums[i] = d_matrix[at.row * 8 + at.column];
    sums[i] = static_cast<int>(float_sums[i]);
  }
  if (kind == s8_s8) device::mma_s8_s8(sums, a, b);
  if (kind == u8_s8) device::mma_u8_s8(sums, a, b);
  if (kind == s8_u8) device::mma_s8_u8(sums, a, b);
  if (kind == bf16) device::mma_bf16(float_sums, a, b);
  if (kind == f16) device::mma_f16(float_sums, a, b);
  if (kind == b1_xor) device::mma_b1_xor(sums, a, b);
  if (kind == b1_and) device::mma_b1_and(sums, a, b);
  for (int i = 0; i < 4; ++i) {
    const Position at = c_position(lane, i, bug);
    d_matrix[at.row * 8 + at.column] = kind == bf16 || kind == f16 ? float_sums[i] : static_cast<float>(sums[i]);
  }
}

// The same product of signed bytes, with the fragments loaded from shared memory: A by one ldmatrix of four matrices, B
// by one of two, and the second half of B once more by one of one.
__global__ void multiply_from_shared(const uint32_t* a_matrix, const uint32_t* b_matrix, float* d_matrix, Bug bug) {
  __shared__ alignas(16) uint32_t a_tile[16][8];
  __shared__ alignas(16) uint32_t b_tile[8][8];
  const int lane = threadIdx.x;
  for (int i = lane; i < 128; i += 32) a_tile[i / 8][i % 8] = a_matrix[i];
  for (int i = lane; i < 64; i += 32) b_tile[i / 8][i % 8] = b_matrix[i];
  __syncwarp();
  uint32_t a[4];
  uint32_t b[2];
  uint32_t again[1];
  const int matrix = lane / 8;
  const int row_half = bug == wrong_matrix_order ? matrix / 2 : matrix % 2;
  const int k_half = bug == wrong_matrix_order ? matrix % 2 : matrix / 2;
  device::load_matrices<4>(a, &a_tile[8 * row_half + lane % 8][4 * k_half + (bug == misaligned_row ? 1 : 0)]);
  device::load_matrices<2>(b, &b_tile[lane % 8][4 * (matrix % 2)]);
  device::load_matrices<1>(again, &b_tile[lane % 8][4]);
  b[1] = again[0];
  int sums[4] = {0, 0, 0, 0};
  device::mma_s8_s8(sums, a, b);
  // Transposed, the two 8 x 8 matrices of 16-bit elements that b_tile holds.
  uint32_t transposed[2];
  device::load_matrices_transposed(transposed, &b_tile[lane % 8][4 * (matrix % 2)]);
  for (int m = 0; m < 2; ++m) {
    const auto element = [&](int row) { return b_tile[row][4 * m + lane / 8] >> 16 * (lane / 4 % 2) & 0xffff; };
    const int row = bug == untransposed_rows ? lane / 4 : lane % 4 * 2;
    if (transposed[m] != (element(row) | element(row + (bug == untransposed_rows ? 0 : 1)) << 16)) sums[0] = 1 << 30;
  }
  for (int i = 0; i < 4; ++i) {
    const Position at = c_position(lane, i, bug);
    d_matrix[at.row * 8 + at.column] = static_cast<float>(sums[i]);
  }
}

// --- the host's side: memory as on a device, and plain loops to compare with ---

template <class T>
struct Array {
  explicit Array(int size) : data(static_cast<T*>(std::aligned_alloc(16, (size * sizeof(T) + 15) / 16 * 16))) {
    std::memset(data, 0, size * sizeof(T));
  }
  ~Array() { std::free(data); }
  T* data;
};

float element(const uint32_t* row, int k, int kind, bool second) {
  const int bits = bits_of(kind);
  const uint32_t field = row[k * bits / 32] >> (k * bits % 32);
  if (bits == 1) return static_cast<float>(field & 1);
  if (bits == 8) {
    const bool is_unsigned = kind == (second ? s8_u8 : u8_s8);
    return is_unsigned ? static_cast<float>(static_cast<uint8_t>(field))
                       : static_cast<float>(static_cast<int8_t>(field));
  }
  const auto half = static_cast<uint16_t>(field);
  if (kind == bf16) return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{half}));
  return __half2float(__half(__half_raw{half}));
}

uint32_t next_random() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return state;
}

// Random bytes and bits; 16-bit floats are whole numbers below 64 in size, so that every sum is exact.
void fill(uint32_t* words, int size, int kind) {
  for (int i = 0; i < size; ++i) {
    words[i] = next_random() >> 16 | (next_random() & 0xffff0000u);
    if (kind != bf16 && kind != f16) continue;
    const auto first = static_cast<float>(static_cast<int>(words[i] % 127) - 63);
    const auto second = static_cast<float>(static_cast<int>((words[i] >> 16) % 127) - 63);
    const uint32_t low =
        kind == bf16 ? __nv_bfloat16_raw(__float2bfloat16_rn(first)).x : __half_raw(__float2half_rn(first)).x;
    const uint32_t high =
        kind == bf16 ? __nv_bfloat16_raw(__float2bfloat16_rn(second)).x : __half_raw(__float2half_rn(second)).x;
    words[i] = low | high << 16;
  }
}

bool products_are_right(int kind, Bug bug) {
  Array<uint32_t> a(128);
  Array<uint32_t> b(64);
  Array<float> d(128);
  Array<float> from_shared(128);
  fill(a.data, 128, kind);
  fill(b.data, 64, kind);
  for (int i = 0; i < 128; ++i) d.data[i] = static_cast<float>(i - 50);
  multiply<<<1, 32>>>(kind, a.data, b.data, d.data, bug);
  if (kind == s8_s8) multiply_from_shared<<<1, 32>>>(a.data, b.data, from_shared.data, bug);
  bool right = true;
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 0;
      for (int k = 0; k < 256 / bits_of(kind); ++k) {
        const float x = element(a.data + 8 * row, k, kind, false);
        const float y = element(b.data + 8 * column, k, kind, true);
        sum += kind == b1_xor ? static_cast<float>(x != y) : x * y;
      }
      const int i = row * 8 + column;
      right = right && d.data[i] == sum + static_cast<float>(i - 50);
      if (kind == s8_s8) right = right && from_shared.data[i] == sum;
    }
  }
  return right;
}

bool sums_are_right(Bug bug) {
  Array<int> values(tiles * tile);
  for (int i = 0; i < tiles * tile; ++i) values.data[i] = i % 101 + 1;
  Array<int> sums(threads);
  sum_tiles<<<1, threads>>>(values.data, sums.data, bug);
  bool right = true;
  for (int thread = 0; thread < threads; ++thread) {
    int expected = 0;
    for (int index = 0; index < tiles; ++index) {
      for (int i = 0; i < per_thread; ++i) {
        const int at = index * tile + (thread + 37) % threads * per_thread + i;
        if (at < count) expected += (index + 1) * values.data[at];
      }
    }
    right = right && sums.data[thread] == expected;
  }
  return right;
}

int main(int, char** arguments) {
  int bug = 0;
  while (std::strcmp(bug_names[bug], arguments[1]) != 0) ++bug;
  bool right = sums_are_right(static_cast<Bug>(bug));
  for (int kind = 0; kind < kinds; ++kind) right = products_are_right(kind, static_cast<Bug>(bug)) && right;
  if (cudaGetLastError() != cudaSuccess) {
    std::printf("ERROR %s\n", cudaGetErrorString(cudaErrorLaunchFailure));
    return 2;
  }
  std::puts(right ? "right" : "WRONG");
  return right ? 0 : 1;
}
