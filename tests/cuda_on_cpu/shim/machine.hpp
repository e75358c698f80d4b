// The simulated machine: runs a grid block by block, the threads of a block as fibers.
//
// A fiber runs until it waits at a barrier or a warp operation, or reaches an atomic; then the next ready one runs. The
// order is set per launch by environment variables:
//   CUDA_ON_CPU_ORDER   asc (default), desc or random: order of blocks, and of the threads in a block
//   CUDA_ON_CPU_SEED    seed of the random order
//   CUDA_ON_CPU_COPIES  late (default): cp.async copies when it is waited for; eager: at once
//   CUDA_ON_CPU_SHARED  bytes of dynamic shared memory that a block may have; by default those of sm_90
//
// What the CUDA programming guide calls undefined is reported as a launch error that names the source line: threads of
// a block at different barriers, a barrier that threads have left the kernel without reaching, warp operations whose
// mask does not match the lanes that take part, deadlock. Out-of-bounds accesses and data races are for the sanitizers:
// every __shared__ variable is a heap block of its own, freshly poisoned (NaN, -1) for each CUDA block.
//
// Not modelled: weak memory (a missing __threadfence), synchronisation of a whole grid, clusters, the speed of
// anything.
#pragma once

#include <cstddef>
#include <source_location>
#include <string>
#include <vector>

// NVIDIA's own types: dim3, uint3, cudaStream_t.
#include <cuda_runtime.h>

namespace cuda_on_cpu {

using Site = std::source_location;

// What the built-in variables of the running thread are.
struct ThreadView {
  uint3 thread_index{};
  unsigned linear_index = 0;
};
struct LaunchView {
  uint3 block_index{};
  dim3 block_dim;
  dim3 grid_dim;
};
extern const ThreadView* current_thread;
extern LaunchView current_launch;

inline unsigned lane() { return current_thread->linear_index % 32; }

size_t most_shared_bytes();

// Runs the grid; `body` calls the kernel with its arguments. Errors are kept for cudaGetLastError.
void run_grid(const char* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes, void (*body)(void*),
              void* arguments);

enum class Vote { count, all, any };
int block_barrier(int predicate, Vote vote, Site site);

// A warp operation: the last lane of `mask` to arrive calls `exchange(inputs, outputs, mask, context)`, where
// inputs[l] and outputs[l] belong to lane l and are null for lanes outside the mask.
using Exchange = void (*)(const void* const* inputs, void* const* outputs, unsigned mask, void* context);
void warp_operation(const char* name, unsigned mask, const void* input, void* output, Exchange exchange, void* context,
                    Site site);
void warp_barrier(unsigned mask, Site site);

// Lets other threads run: at atomics, so that interleavings vary and a thread that polls makes progress.
void yield();

// A cp.async: the first valid_bytes come from the source, zeros fill the rest.
struct Copy {
  void* target;
  const void* source;
  size_t bytes;
  size_t valid_bytes;
};
// Keeps the running thread's copy for later; false when copies are to be made at once.
bool put_off(const Copy& copy);
void commit_copies();
// The copies that cp.async.wait_group waits for: those of all but the `pending` newest groups of the running thread.
std::vector<Copy> take_copies(size_t pending);

// Memory of the running block, the same for all its threads.
void* shared_variable(const void* key, size_t bytes);
void* dynamic_shared();

// Ends the launch with an error that names the kernel, block and thread.
[[noreturn]] void fail(const std::string& message);
std::string describe(const Site& site);

// The error of a launch, for the runtime's stand-ins; empty when there is none.
std::string& last_error();

}  // namespace cuda_on_cpu
