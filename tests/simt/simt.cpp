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
  Hand board[2][32];
  void (*meeting)(Hand*) = nullptr;  // the operation for which the waiting lanes meet
  std::vector<int> waiting, runnable;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> at_barrier;
  std::vector<size_t> order;  // of the warps: the first runnable one runs
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
std::mutex one_launch;  // a thread's position in the grid is global to the process: one launch at a time

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

// Saves the callee-saved registers, switches the stack, and continues there.
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
  *--top = nullptr;  // the return address of run_fiber; keeps the stack aligned as after a call
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

// Between two barriers warps run one after the other, in a new random order each time. The first is as far ahead of the
// last as a missing barrier allows.
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

// The initial shared memory of a block: NaN in float32, bfloat16 and float16. The allocation has exactly its size, so
// that AddressSanitizer sees accesses beyond it.
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
  // Blocks are independent, so they run in a random order: steps that visit each block once.
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

const Hand* meet(const Hand& mine, void (*finish)(Hand*)) {
  Fiber& f = machine.fibers[size_t(machine.current)];
  Warp& w = machine.warps[size_t(machine.current) / 32];
  Hand* board = w.board[f.parity];
  f.parity = !f.parity;
  board[lane()] = mine;
  if (w.waiting.empty()) w.meeting = finish;
  else if (w.meeting != finish) fail("lanes of a warp meet in different operations");
  w.waiting.push_back(machine.current);
  if (w.waiting.size() == 32) {
    if (finish != nullptr) finish(board);
    w.runnable.swap(w.waiting);
  }
  to_scheduler(false);
  return board;
}

// The fragments of the PTX ISA (mma.m16n8k16 for 16-bit numbers, mma.m16n8k8 for tf32): register r of a lane has the
// rows and columns below. A register has two neighbours of a 16-bit matrix, or one tf32 number. Sums are exact, then
// truncated, as far as the hardware's rounding is known. The low 13 bits of a tf32 number are ignored.
template <int per_register, class Number>
void multiply(Hand* hands, Number&& number) {
  constexpr int depth = 8 * per_register;
  float a[16][depth], b[depth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, place = lane % 4 * per_register;
    for (int e = 0; e < per_register; ++e) {
      for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][place + r / 2 * depth / 2 + e] = number(hands[lane].a[r], e);
      for (int r = 0; r < 2; ++r) b[place + r * depth / 2 + e][group] = number(hands[lane].b[r], e);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
      float& d = hands[lane].d[r];
      double sum = double(d);
      for (int k = 0; k < depth; ++k) sum += double(a[row][k]) * double(b[k][column]);
      d = float(sum);
      if (std::isfinite(sum) && std::abs(double(d)) > std::abs(sum)) d = std::nextafter(d, 0.f);
    }
  }
}

void multiply_bf16(Hand* hands) {
  multiply<2>(hands, [](uint32_t u, int e) { return std::bit_cast<float>(e == 0 ? u << 16 : u & 0xffff0000); });
}
void multiply_f16(Hand* hands) {
  multiply<2>(hands, [](uint32_t u, int e) { return float(std::bit_cast<_Float16>(uint16_t(u >> 16 * e))); });
}
void multiply_tf32(Hand* hands) {
  multiply<1>(hands, [](uint32_t u, int) {
    const bool nan = (u & 0x7fffffff) > 0x7f800000;  // its payload may lie in the truncated bits
    return std::bit_cast<float>(nan ? u : u & 0xffffe000);
  });
}

// Lane 8 m + r has the address of row r of matrix m: 8 numbers of 16 bits. Lane 4 r + c gets numbers 2 c and 2 c + 1 of
// row r of each matrix; if transposed, of column r.
template <bool transposed>
void load_all(Hand* hands) {
  uint16_t matrix[4][8][8];
  for (int lane = 0; lane < 32; ++lane) {
    if (hands[lane].number % 16 != 0) fail("a row of a matrix is not aligned to 16 bytes");
    std::memcpy(matrix[lane / 8][lane % 8], reinterpret_cast<const void*>(uintptr_t(hands[lane].number)), 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < 4; ++m) {
      const int row = lane / 4, column = lane % 4 * 2;
      const auto& x = matrix[m];
      const uint16_t low = transposed ? x[column][row] : x[row][column];
      const uint16_t high = transposed ? x[column + 1][row] : x[row][column + 1];
      hands[lane].a[m] = uint32_t(high) << 16 | low;
    }
  }
}
void load_matrices(Hand* hands) { load_all<false>(hands); }
void load_matrices_transposed(Hand* hands) { load_all<true>(hands); }

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
