// Fibers: stacks that the scheduler switches between, one per CUDA thread. The sanitizers are told of every switch.
// x86-64 only.
#pragma once

#include <cstddef>

namespace cuda_on_cpu {

constexpr size_t stack_bytes = 128 << 10;

class Fiber {
 public:
  // The fiber that is running when this is called: the scheduler itself.
  Fiber() = default;
  // A fiber that starts in `entry`, which must never return, at the first switch to it.
  Fiber(char* stack, void (*entry)());

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  char* stack = nullptr;
  size_t stack_size = 0;
  void* stack_pointer = nullptr;
  void* asan_fake_stack = nullptr;
  void* tsan_state = nullptr;
};

void switch_fiber(Fiber& from, Fiber& to);
// The last switch of a fiber; never comes back.
[[noreturn]] void leave_fiber(Fiber& from, Fiber& to);
// The first thing a fiber does; `from` is the fiber that switched to it.
void enter_fiber(Fiber& from);

// What ThreadSanitizer must know to see the synchronisation of the simulated machine. Empty in other builds.
void happens_after(void* tag);   // acquire: what was released to the tag is visible from here on
void happens_before(void* tag);  // release
void bind_scheduler(Fiber& scheduler);
void retire(Fiber& fiber);
void forget_retired_fibers();

// Accesses of this fiber are not looked at while one lives: what the machine does on its behalf (bookkeeping, handing
// registers from lane to lane, poisoning shared memory) is not the kernel's doing.
class UncheckedScope {
 public:
  UncheckedScope();
  ~UncheckedScope();
};

}  // namespace cuda_on_cpu
