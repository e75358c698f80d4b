// Kernels that show what the harness finds: a correct program, or, given the name of a bug, the same program with that
// one bug. Prints "WRONG" and returns 1 when a value is wrong, and the launch's error with 2 when there was one.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#define BUGS(X)                                                                       \
  X(none)                                                                             \
  X(missing_barrier)          /* shared memory is read before all of it is written */ \
  X(missing_second_barrier)   /* shared memory is overwritten while still read */     \
  X(divergent_barrier)        /* threads of a block wait at different barriers */     \
  X(barrier_after_exit)       /* some threads have left the kernel */                 \
  X(global_read_past_end)     /* one element past an array */                         \
  X(shared_index_overflow)    /* one element past a shared array */                   \
  X(dynamic_shared_too_small) /* one word less than the kernel uses */                \
  X(cross_block_sum)          /* blocks add to one number without an atomic */        \
  X(warp_synchronous)         /* lanes share memory without __syncwarp */             \
  X(shuffle_in_branch)        /* a full mask where half the lanes take part */        \
  X(shuffle_outside_mask)     /* a lane reads one that its mask leaves out */         \
  X(deadlock)                 /* a warp waits for a lane that waits for the block */  \
  X(bad_launch)               /* more threads than a block may have */

#define ENUMERATOR(name) name,
enum Bug { BUGS(ENUMERATOR) };
#define STRING(name) #name,
const char* const bug_names[] = {BUGS(STRING)};

constexpr int warps = 8;

__global__ void sum(const float* values, int count, float* total, Bug bug) {
  __shared__ float partial[warps];
  float mine = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) mine += values[i];
  if (bug == global_read_past_end && threadIdx.x == 0 && blockIdx.x == 0) mine += values[count];
  for (int offset = 16; offset > 0; offset /= 2) mine += __shfl_down_sync(~0u, mine, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
  if (bug != missing_barrier) __syncthreads();
  if (threadIdx.x >= 32) return;
  const int used = bug == shared_index_overflow ? warps + 1 : warps;
  mine = threadIdx.x < used ? partial[threadIdx.x] : 0.0f;
  for (int offset = 16; offset > 0; offset /= 2) mine += __shfl_down_sync(~0u, mine, offset);
  if (threadIdx.x != 0) return;
  if (bug == cross_block_sum) {
    *total += mine;
  } else {
    atomicAdd(total, mine);
  }
}

// Each round shifts the block's values by one thread through shared memory.
__global__ void rotate(int* values, int rounds, Bug bug) {
  extern __shared__ int ring[];
  int mine = values[threadIdx.x];
  for (int round = 0; round < rounds; ++round) {
    ring[threadIdx.x] = mine;
    __syncthreads();
    mine = ring[(threadIdx.x + 1) % blockDim.x];
    if (bug != missing_second_barrier) __syncthreads();
  }
  if (bug == divergent_barrier) {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (bug == barrier_after_exit) {
    if (threadIdx.x == 5) return;
    __syncthreads();
  }
  values[threadIdx.x] = mine;
}

__global__ void reverse_warp(int* values, Bug bug) {
  __shared__ int lanes[32];
  lanes[threadIdx.x] = values[threadIdx.x];
  if (bug != warp_synchronous) __syncwarp();
  int mine = lanes[31 - threadIdx.x];
  if (bug == shuffle_in_branch && threadIdx.x < 16) mine = __shfl_xor_sync(~0u, mine, 1);
  if (threadIdx.x < 16) {
    mine = __shfl_sync(0xffffu, mine, bug == shuffle_outside_mask ? 20 : static_cast<int>(threadIdx.x));
  }
  if (bug == deadlock) {
    if (threadIdx.x == 0) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
  values[threadIdx.x] = mine;
}

template <class T>
struct Array {
  explicit Array(int count) : data(static_cast<T*>(std::calloc(count, sizeof(T)))) {}
  ~Array() { std::free(data); }
  T* data;
};

Bug bug_named(const char* name) {
  int bug = 0;
  while (std::strcmp(bug_names[bug], name) != 0) ++bug;
  return static_cast<Bug>(bug);
}

int main(int, char** arguments) {
  const Bug bug = bug_named(arguments[1]);
  constexpr int count = 5000;
  Array<float> values(count);
  Array<float> total(1);
  for (int i = 0; i < count; ++i) values.data[i] = static_cast<float>(i % 7);
  sum<<<4, warps * 32>>>(values.data, count, total.data, bug);
  float expected = 0;
  for (int i = 0; i < count; ++i) expected += static_cast<float>(i % 7);

  constexpr int threads = 96, rounds = 3;
  Array<int> ring(threads);
  for (int i = 0; i < threads; ++i) ring.data[i] = i;
  const int words = bug == dynamic_shared_too_small ? threads - 1 : threads;
  rotate<<<1, bug == bad_launch ? 2048 : threads, words * sizeof(int)>>>(ring.data, rounds, bug);

  Array<int> warp(32);
  for (int i = 0; i < 32; ++i) warp.data[i] = i;
  reverse_warp<<<1, 32>>>(warp.data, bug);

  if (cudaGetLastError() != cudaSuccess) {
    std::printf("ERROR %s\n", cudaGetErrorString(cudaErrorLaunchFailure));
    return 2;
  }
  bool right = *total.data == expected;
  for (int i = 0; i < threads; ++i) right = right && ring.data[i] == (i + rounds) % threads;
  for (int i = 0; i < 32; ++i) right = right && warp.data[i] == 31 - i;
  std::puts(right ? "right" : "WRONG");
  return right ? 0 : 1;
}
