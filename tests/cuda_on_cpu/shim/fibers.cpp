#include "fibers.hpp"

#include <cstdlib>
#include <vector>

#if !defined(__x86_64__)
#error "tests/cuda_on_cpu switches fibers in x86-64 assembly"
#endif

// This file and machine.cpp are compiled without instrumentation, so the build says which sanitizer the kernels use.
#if defined(CUDA_ON_CPU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(CUDA_ON_CPU_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* tag);
void __tsan_release(void* tag);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#endif

// Saves the callee-saved registers on the old stack, takes them from the new one.
asm(R"(
.text
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
extern "C" void cuda_on_cpu_switch(void** from, void* to);

namespace cuda_on_cpu {

Fiber::Fiber(char* stack, void (*entry)()) : stack(stack), stack_size(stack_bytes) {
  void** top = reinterpret_cast<void**>(stack + stack_bytes - 64);
  *--top = nullptr;  // return address of `entry`: ends every backtrace and unwinding
  *--top = reinterpret_cast<void*>(entry);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  stack_pointer = top;
#if defined(CUDA_ON_CPU_ASAN)
  __asan_unpoison_memory_region(stack, stack_bytes);
#endif
#if defined(CUDA_ON_CPU_TSAN)
  tsan_state = __tsan_create_fiber(0);
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_start_switch_fiber(&from.asan_fake_stack, to.stack, to.stack_size);
#endif
#if defined(CUDA_ON_CPU_TSAN)
  constexpr unsigned no_synchronisation = 1;
  __tsan_switch_to_fiber(to.tsan_state, no_synchronisation);
#endif
  cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
#endif
}

void leave_fiber(Fiber& from, Fiber& to) {
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_start_switch_fiber(nullptr, to.stack, to.stack_size);
#endif
#if defined(CUDA_ON_CPU_TSAN)
  __tsan_switch_to_fiber(to.tsan_state, 1);
#endif
  cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
  std::abort();
}

void enter_fiber([[maybe_unused]] Fiber& from) {
#if defined(CUDA_ON_CPU_ASAN)
  const void* bottom = nullptr;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &from.stack_size);
  from.stack = static_cast<char*>(const_cast<void*>(bottom));
#endif
}

#if defined(CUDA_ON_CPU_TSAN)

namespace {
// ThreadSanitizer gives the number of a destroyed fiber to the next one created, which would order their blocks. So
// fibers are kept until the launch ends, or as many as its run time bears.
constexpr size_t most_retired_fibers = 4000;
std::vector<void*> retired;
}  // namespace

void happens_after(void* tag) { __tsan_acquire(tag); }
void happens_before(void* tag) { __tsan_release(tag); }
void bind_scheduler(Fiber& scheduler) { scheduler.tsan_state = __tsan_get_current_fiber(); }
void retire(Fiber& fiber) {
  retired.push_back(fiber.tsan_state);
  if (retired.size() > most_retired_fibers) forget_retired_fibers();
}
void forget_retired_fibers() {
  for (void* fiber : retired) __tsan_destroy_fiber(fiber);
  retired.clear();
}
UncheckedScope::UncheckedScope() { __tsan_ignore_thread_begin(); }
UncheckedScope::~UncheckedScope() { __tsan_ignore_thread_end(); }

#else

void happens_after(void*) {}
void happens_before(void*) {}
void bind_scheduler(Fiber&) {}
void retire(Fiber&) {}
void forget_retired_fibers() {}
UncheckedScope::UncheckedScope() {}
UncheckedScope::~UncheckedScope() {}

#endif

}  // namespace cuda_on_cpu
