#include "simt.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
namespace {

constexpr size_t kStack = size_t(192) << 10;

struct Copy {
  void* to;
  const void* from;
  bool whole;
};

struct Fiber {
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;
  std::unique_ptr<char[]> stack;
  bool done = false;
  bool parity = false;                    // which of the warp's two boards the next exchange uses
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;
};

struct Warp {
  uint64_t board[2][32];
  std::vector<int> waiting, runnable;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> at_barrier;
  std::vector<size_t> order;  // of the warps: the first that can go on does
  std::unique_ptr<char, void (*)(void*)> shared_memory{nullptr, std::free};
  char* shared = nullptr;
  const std::function<void()>* kernel = nullptr;
  void* scheduler = nullptr;
  void* scheduler_fake = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  int current = 0, threads = 0, alive = 0;
  uint64_t random = 1;
};

Machine machine;
std::mutex one_launch;  // where a thread is in the grid is known to the whole process: one launch at a time

uint64_t first_seed() {
  const char* text = std::getenv("MEMKERNELS_SIMT_SEED");
  return text == nullptr ? 1 : std::strtoull(text, nullptr, 10) * 2 + 1;
}
const uint64_t chosen_seed = first_seed();

uint64_t draw() {
  uint64_t& x = machine.random;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return x;
}

// Saves the registers that a call must keep, changes the stack, and goes on there.
#if defined(__x86_64__)
extern "C" void memkernels_simt_switch(void** from, void* to);
asm(R"(
.text
.type memkernels_simt_switch, @function
memkernels_simt_switch:
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
.size memkernels_simt_switch, .-memkernels_simt_switch
)");
#else
#error "the host runtime of the kernels switches fibers on x86-64 only"
#endif

void to_scheduler(bool last) {
  Fiber& f = machine.fibers[size_t(machine.current)];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &f.fake_stack, machine.scheduler_stack, machine.scheduler_size);
#endif
  (void)last;
  memkernels_simt_switch(&f.stack_pointer, machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "simt: block %u: %s\n", blockIdx.x, what);
  std::abort();
}

void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_size);
#endif
  (*machine.kernel)();
  wait(0);
  machine.fibers[size_t(machine.current)].done = true;
  --machine.alive;
  to_scheduler(true);
  std::abort();  // a finished fiber is never resumed
}

void prepare(Fiber& f) {
  if (f.stack == nullptr) f.stack.reset(new char[kStack]);
  auto** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(f.stack.get()) + kStack) & ~uintptr_t(15));
  *--top = nullptr;  // where run_fiber would return to; keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&run_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.stack_pointer = top;
  f.fake_stack = nullptr;
  f.done = f.parity = false;
  f.groups.clear(), f.open.clear();
}

void resume(int i) {
  machine.current = i;
  threadIdx.x = unsigned(i);
  Fiber& f = machine.fibers[size_t(i)];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake, f.stack.get(), kStack);
#endif
  memkernels_simt_switch(&machine.scheduler, f.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake, nullptr, nullptr);
#endif
}

// From one barrier to the next warps run one after the other, in an order that is drawn anew each time: the first is as far ahead of
// the last as a missing barrier lets it be.
void draw_order() {
  for (size_t i = 0; i < machine.order.size(); ++i) machine.order[i] = i;
  for (size_t i = machine.order.size(); i > 1; --i) std::swap(machine.order[i - 1], machine.order[draw() % i]);
}

void run_block() {
  machine.at_barrier.clear();
  machine.order.resize(machine.warps.size());
  draw_order();
  for (Warp& w : machine.warps) w.waiting.clear(), w.runnable.clear();
  for (int i = 0; i < machine.threads; ++i) {
    prepare(machine.fibers[size_t(i)]);
    machine.warps[size_t(i) / 32].runnable.push_back(i);
  }
  machine.alive = machine.threads;
  while (machine.alive > 0) {
    std::vector<int>* runnable = nullptr;
    for (size_t w : machine.order) {
      if (!machine.warps[w].runnable.empty()) {
        runnable = &machine.warps[w].runnable;
        break;
      }
    }
    if (runnable == nullptr) fail("its threads wait for each other: a barrier or a warp operation misses some");
    std::swap((*runnable)[draw() % runnable->size()], runnable->back());
    const int i = runnable->back();
    runnable->pop_back();
    resume(i);
  }
  if (!machine.at_barrier.empty()) fail("a thread waits at a barrier that others have passed by");
}

// Shared memory as a block finds it: NaN in float32, bfloat16 and float16. Each block has memory of exactly its size, so that an
// address sanitizer sees what lies beyond.
void poison(int64_t bytes) {
  machine.shared_memory.reset(static_cast<char*>(std::malloc(size_t(bytes))));  // aligned to 16
  machine.shared = machine.shared_memory.get();
  std::memset(machine.shared, 0xff, size_t(bytes));
}

}  // namespace

void launch(int64_t blocks, int threads, int64_t shared, const std::function<void()>& kernel) {
  if (threads % 32 != 0) fail("a block is made of whole warps here");
  const std::lock_guard<std::mutex> alone(one_launch);
  machine.kernel = &kernel;
  machine.threads = threads;
  machine.random = chosen_seed * 0x9e3779b97f4a7c15u | 1;
  if (machine.fibers.size() < size_t(threads)) machine.fibers.resize(size_t(threads));
  machine.warps.resize(size_t(threads / 32));
  blockDim.x = unsigned(threads), gridDim.x = unsigned(blocks);
  // Blocks are independent of each other, whatever their order: they come in steps that visit each of them once.
  uint64_t at = draw() % uint64_t(blocks), step = 1 + draw() % uint64_t(blocks);
  while (std::gcd(step, uint64_t(blocks)) != 1) ++step;
  for (int64_t b = 0; b < blocks; ++b, at = (at + step) % uint64_t(blocks)) {
    blockIdx.x = unsigned(at);
    poison(shared);
    run_block();
  }
}

char* shared() { return machine.shared; }
int lane() { return machine.current & 31; }

void barrier() {
  machine.at_barrier.push_back(machine.current);
  if (int(machine.at_barrier.size()) == machine.threads) {
    for (int i : machine.at_barrier) machine.warps[size_t(i) / 32].runnable.push_back(i);
    machine.at_barrier.clear();
    draw_order();
  }
  to_scheduler(false);
}

const uint64_t* exchange(uint64_t mine) {
  Fiber& f = machine.fibers[size_t(machine.current)];
  Warp& w = machine.warps[size_t(machine.current) / 32];
  uint64_t* board = w.board[f.parity];
  f.parity = !f.parity;
  board[lane()] = mine;
  w.waiting.push_back(machine.current);
  if (w.waiting.size() == 32) {
    w.runnable.swap(w.waiting);
  }
  to_scheduler(false);
  return board;
}

void copy(void* to, const void* from, bool whole) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (whole && reinterpret_cast<uintptr_t>(from) % 16 != 0)) {
    fail("a copy of 16 bytes is not aligned to 16");
  }
  std::memset(to, 0xff, 16);
  machine.fibers[size_t(machine.current)].open.push_back({to, from, whole});
}

void commit() {
  Fiber& f = machine.fibers[size_t(machine.current)];
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}

void wait(int pending) {
  Fiber& f = machine.fibers[size_t(machine.current)];
  while (int(f.groups.size()) > pending) {
    for (const Copy& c : f.groups.front()) {
      if (c.whole) std::memcpy(c.to, c.from, 16);
      else std::memset(c.to, 0, 16);
    }
    f.groups.erase(f.groups.begin());
  }
}

}  // namespace simt
