#include "machine.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <utility>
#include <vector>

#include "fibers.hpp"

namespace cuda_on_cpu {

const ThreadView* current_thread = nullptr;
LaunchView current_launch;

namespace {

enum class State { ready, at_barrier, at_warp_operation, left };

struct Thread {
  ThreadView view;
  std::unique_ptr<Fiber> fiber;
  State state = State::ready;
  Site site{};
  int predicate = 0;
  const char* operation = nullptr;
  unsigned mask = 0;
  const void* input = nullptr;
  void* output = nullptr;
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> committed_groups;
  // Addresses that stand for synchronisation events (see meet). On the heap, where freeing them ends their history.
  std::unique_ptr<char> arrival = std::make_unique<char>();
  std::shared_ptr<char> departure;
};

enum class Order { ascending, descending, random };

struct Free {
  void operator()(void* pointer) const { std::free(pointer); }
};
using HeapBlock = std::unique_ptr<void, Free>;

// Thrown on a fiber to leave the kernel once the launch has failed, so that destructors run.
struct Abandoned {};

struct Machine {
  const char* kernel = "";
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  size_t dynamic_shared_bytes = 0;
  Order order = Order::ascending;
  std::mt19937 random;
  bool late_copies = true;
  bool failed = false;

  Fiber scheduler;
  std::vector<Thread> threads;
  std::vector<HeapBlock> stacks;
  std::deque<unsigned> ready;
  std::map<const void*, HeapBlock> shared;
  HeapBlock dynamic_shared;

  // Addresses that stand for synchronisation events.
  char launch_start = 0;
  char launch_end = 0;
};

Machine machine;

Thread& running() { return machine.threads[current_thread->linear_index]; }

HeapBlock poisoned(size_t bytes) {
  void* pointer = nullptr;
  if (posix_memalign(&pointer, 128, std::max<size_t>(bytes, 1)) != 0) std::abort();
  std::memset(pointer, 0xFF, bytes);
  return HeapBlock(pointer);
}

void wait_as(State state) {
  Thread& thread = running();
  thread.state = state;
  switch_fiber(*thread.fiber, machine.scheduler);
  if (machine.failed) throw Abandoned{};
}

template <class Items>
void put_in_order(Items& items) {
  if (machine.order == Order::descending) std::reverse(items.begin(), items.end());
  if (machine.order == Order::random) std::shuffle(items.begin(), items.end(), machine.random);
}

void release(std::vector<unsigned> indices) {
  put_in_order(indices);
  for (unsigned index : indices) {
    machine.threads[index].state = State::ready;
    machine.ready.push_back(index);
  }
}

// What each of these threads did before its arrival is visible to all of them after their departure; what one of them
// does after it is not. Called by the last to arrive.
void meet(const std::vector<unsigned>& indices) {
  const auto departure = std::make_shared<char>();
  for (unsigned index : indices) happens_after(machine.threads[index].arrival.get());
  happens_before(departure.get());
  for (unsigned index : indices) machine.threads[index].departure = departure;
}

void fiber_main() {
  enter_fiber(machine.scheduler);
  happens_after(&machine.launch_start);
  try {
    machine.body(machine.arguments);
  } catch (const Abandoned&) {
  }
  happens_before(&machine.launch_end);
  running().state = State::left;
  leave_fiber(*running().fiber, machine.scheduler);
}

void resume(Thread& thread) {
  current_thread = &thread.view;
  switch_fiber(machine.scheduler, *thread.fiber);
  current_thread = nullptr;
}

void report_deadlock() {
  std::string message = std::string("deadlock in kernel ") + machine.kernel + ":";
  int named = 0;
  for (const Thread& thread : machine.threads) {
    if (thread.state == State::left || named++ >= 4) continue;
    message += " thread " + std::to_string(thread.view.linear_index) + " waits at " +
               (thread.state == State::at_barrier ? "__syncthreads" : thread.operation) + ", " + describe(thread.site) +
               ";";
  }
  last_error() = message;
  machine.failed = true;
}

void start_threads(const dim3& block) {
  const unsigned count = block.x * block.y * block.z;
  machine.threads.clear();
  machine.threads.resize(count);
  machine.ready.clear();
#if defined(CUDA_ON_CPU_TSAN)
  machine.stacks.clear();  // reused stacks would look like races between the blocks that used them
#endif
  while (machine.stacks.size() < count) machine.stacks.emplace_back(std::aligned_alloc(64, stack_bytes));
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = machine.threads[i];
    thread.view.linear_index = i;
    thread.view.thread_index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    thread.fiber = std::make_unique<Fiber>(static_cast<char*>(machine.stacks[i].get()), fiber_main);
    machine.ready.push_back(i);
  }
  put_in_order(machine.ready);
}

unsigned take_next_ready() {
  const size_t choice = machine.order == Order::random ? machine.random() % machine.ready.size() : 0;
  const unsigned index = machine.ready[choice];
  machine.ready.erase(machine.ready.begin() + static_cast<std::ptrdiff_t>(choice));
  return index;
}

void run_block(const dim3& block) {
  machine.dynamic_shared = machine.dynamic_shared_bytes > 0 ? poisoned(machine.dynamic_shared_bytes) : nullptr;
  start_threads(block);
  size_t left = 0;
  while (left < machine.threads.size() && !machine.failed) {
    if (machine.ready.empty()) {
      report_deadlock();
      break;
    }
    Thread& thread = machine.threads[take_next_ready()];
    resume(thread);
    left += thread.state == State::left;
  }
  if (machine.failed) {
    for (Thread& thread : machine.threads) {
      if (thread.state != State::left) resume(thread);
    }
  }
  for (Thread& thread : machine.threads) retire(*thread.fiber);
  machine.shared.clear();
}

void read_settings() {
  const char* order = std::getenv("CUDA_ON_CPU_ORDER");
  const char* seed = std::getenv("CUDA_ON_CPU_SEED");
  machine.order = order == nullptr || *order == 'a' ? Order::ascending
                  : *order == 'd'                   ? Order::descending
                                                    : Order::random;
  machine.random.seed(seed == nullptr ? 0 : static_cast<unsigned>(std::atoi(seed)));
  const char* copies = std::getenv("CUDA_ON_CPU_COPIES");
  machine.late_copies = copies == nullptr || *copies == 'l';
}

bool valid_configuration(const dim3& grid, const dim3& block, size_t dynamic_shared_bytes) {
  const unsigned threads = block.x * block.y * block.z;
  return grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 &&
         threads > 0 && threads <= 1024 && block.z <= 64 && dynamic_shared_bytes <= most_shared_bytes();
}

std::vector<uint64_t> blocks_in_order(const dim3& grid) {
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  for (uint64_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  put_in_order(blocks);
  return blocks;
}

}  // namespace

size_t most_shared_bytes() {
  const char* bytes = std::getenv("CUDA_ON_CPU_SHARED");
  return bytes == nullptr ? 227 << 10 : static_cast<size_t>(std::atoll(bytes));
}

void run_grid(const char* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes, void (*body)(void*),
              void* arguments) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard lock(one_launch_at_a_time);
  if (!valid_configuration(grid, block, dynamic_shared_bytes)) {
    last_error() = std::string("invalid launch configuration of kernel ") + kernel;
    return;
  }
  machine.kernel = kernel;
  machine.body = body;
  machine.arguments = arguments;
  machine.dynamic_shared_bytes = dynamic_shared_bytes;
  machine.failed = false;
  current_launch = {{}, block, grid};
  read_settings();
  bind_scheduler(machine.scheduler);
  happens_before(&machine.launch_start);
  {
    const UncheckedScope unchecked;
    for (uint64_t index : blocks_in_order(grid)) {
      current_launch.block_index = {static_cast<unsigned>(index % grid.x),
                                    static_cast<unsigned>(index / grid.x % grid.y),
                                    static_cast<unsigned>(index / grid.x / grid.y)};
      run_block(block);
      if (machine.failed) break;
    }
  }
  happens_after(&machine.launch_end);
  forget_retired_fibers();
}

int block_barrier(int predicate, Vote vote, Site site) {
  const UncheckedScope unchecked;
  Thread& me = running();
  me.site = site;
  me.predicate = predicate;
  happens_before(me.arrival.get());
  std::vector<unsigned> arrived = {me.view.linear_index};
  for (const Thread& other : machine.threads) {
    if (other.state == State::left) {
      fail("__syncthreads at " + describe(site) + ", but thread " + std::to_string(other.view.linear_index) +
           " has left the kernel");
    }
    if (&other == &me || other.state != State::at_barrier) continue;
    if (other.site.line() != site.line() || std::strcmp(other.site.file_name(), site.file_name()) != 0) {
      fail("divergent __syncthreads: threads wait at " + describe(other.site) + " and at " + describe(site));
    }
    arrived.push_back(other.view.linear_index);
  }
  if (arrived.size() == machine.threads.size()) {
    int count = 0;
    for (const Thread& thread : machine.threads) count += thread.predicate != 0;
    const int result = vote == Vote::count ? count
                       : vote == Vote::all ? count == static_cast<int>(machine.threads.size())
                                           : count > 0;
    for (Thread& thread : machine.threads) thread.predicate = result;
    std::sort(arrived.begin(), arrived.end());
    meet(arrived);
    release(arrived);
    wait_as(State::ready);
  } else {
    wait_as(State::at_barrier);
  }
  happens_after(me.departure.get());
  return me.predicate;
}

void warp_operation(const char* name, unsigned mask, const void* input, void* output, Exchange exchange, void* context,
                    Site site) {
  const UncheckedScope unchecked;
  Thread& me = running();
  const unsigned first = me.view.linear_index & ~31u;
  const std::string where = std::string(name) + " at " + describe(site);
  if ((mask >> lane() & 1) == 0) fail(where + ": the calling lane is not in its own mask");
  // A full mask names the lanes that exist; the last warp of a block may have fewer.
  if (mask == ~0u && machine.threads.size() - first < 32) mask = (1u << (machine.threads.size() - first)) - 1;
  me.operation = name;
  me.mask = mask;
  me.input = input;
  me.output = output;
  me.site = site;

  std::vector<unsigned> members;
  const void* inputs[32] = {};
  void* outputs[32] = {};
  bool complete = true;
  for (unsigned l = 0; l < 32; ++l) {
    if ((mask >> l & 1) == 0) continue;
    if (first + l >= machine.threads.size())
      fail(where + ": the mask names lane " + std::to_string(l) + " beyond the block");
    const Thread& other = machine.threads[first + l];
    if (other.state == State::left) {
      fail(where + ": lane " + std::to_string(l) + " of the mask has left the kernel");
    }
    const bool waits = &other != &me && other.state == State::at_warp_operation;
    const bool same = other.mask == mask && std::strcmp(other.operation == nullptr ? "" : other.operation, name) == 0;
    if (waits && (other.mask >> lane() & 1) != 0 && !same) {
      fail("divergent warp: " + where + " meets " + other.operation + " at " + describe(other.site));
    }
    complete = complete && (&other == &me || (waits && same));
    members.push_back(first + l);
    inputs[l] = other.input;
    outputs[l] = other.output;
  }
  if (!complete) return wait_as(State::at_warp_operation);
  exchange(inputs, outputs, mask, context);
  release(members);
  wait_as(State::ready);
}

void warp_barrier(unsigned mask, Site site) {
  Thread& me = running();
  happens_before(me.arrival.get());
  const Exchange meet_lanes = [](const void* const*, void* const*, unsigned lanes, void*) {
    const unsigned first = current_thread->linear_index & ~31u;
    std::vector<unsigned> members;
    for (unsigned l = 0; l < 32; ++l) {
      if ((lanes >> l & 1) != 0) members.push_back(first + l);
    }
    meet(members);
  };
  warp_operation("__syncwarp", mask, nullptr, nullptr, meet_lanes, nullptr, site);
  happens_after(me.departure.get());
}

void yield() {
  const UncheckedScope unchecked;
  release({current_thread->linear_index});
  wait_as(State::ready);
}

bool put_off(const Copy& copy) {
  const UncheckedScope unchecked;
  if (machine.late_copies) running().open_group.push_back(copy);
  return machine.late_copies;
}

void commit_copies() {
  const UncheckedScope unchecked;
  running().committed_groups.push_back(std::move(running().open_group));
  running().open_group.clear();
}

std::vector<Copy> take_copies(size_t pending) {
  const UncheckedScope unchecked;
  auto& groups = running().committed_groups;
  std::vector<Copy> taken;
  for (; groups.size() > pending; groups.pop_front()) {
    taken.insert(taken.end(), groups.front().begin(), groups.front().end());
  }
  return taken;
}

void* shared_variable(const void* key, size_t bytes) {
  const UncheckedScope unchecked;
  HeapBlock& block = machine.shared[key];
  if (block == nullptr) block = poisoned(bytes);
  return block.get();
}

void* dynamic_shared() { return machine.dynamic_shared.get(); }

void fail(const std::string& message) {
  const UncheckedScope unchecked;
  const auto triple = [](const uint3& index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
  };
  last_error() = message + " [kernel " + machine.kernel + ", block " + triple(current_launch.block_index) +
                 ", thread " + triple(current_thread->thread_index) + "]";
  machine.failed = true;
  throw Abandoned{};
}

std::string describe(const Site& site) {
  const char* name = std::strrchr(site.file_name(), '/');
  return std::string(name == nullptr ? site.file_name() : name + 1) + ":" + std::to_string(site.line());
}

std::string& last_error() {
  static std::string message;
  return message;
}

}  // namespace cuda_on_cpu
