// Every allocation of every call fails in turn, over the operator library's own threads and scratch memory (csrc/binding/cpu/threads.cpp).
// The call must throw std::bad_alloc, leave nothing behind that the next call on the same thread could trip over, and a write in
// place must leave the memory as it was.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <thread>

#include "grid.h"
#include "torch/csrc/stable/ops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace native {
namespace {

// Allocations from now until one fails; not armed: below zero.
std::atomic<int64_t> left{-1};
std::atomic<bool> failed{false};
std::atomic<int64_t> runs_over_threads{0};
thread_local bool spared = false;  // this thread allocates for the program, not for a kernel

bool fails() {
  if (spared || left.load(std::memory_order_relaxed) < 0 || left.fetch_sub(1) != 0) return false;
  failed = true;
  return true;
}

void* take(size_t bytes, size_t align) {
  if (fails()) return nullptr;
  return std::aligned_alloc(align, (bytes + align - 1) / align * align + (bytes == 0 ? align : 0));
}

unsigned float_state() {
#if defined(__x86_64__)
  return _mm_getcsr() & ~0x3fu;  // without the flags of what has happened
#else
  return 0;
#endif
}

// What one call left.
struct Attempt {
  bool threw = false, failed = false, state_kept = true;
  int64_t over_threads = 0;
  std::vector<std::string> bytes;
};

Attempt attempt(std::initializer_list<Result> results, const std::function<void()>& call, int64_t fail_at) {
  Attempt a;
  for (const Result& r : results) r.got->poison();
  const int64_t before = runs_over_threads;
  const unsigned state = float_state();
  failed = false;
  left = fail_at;
  try {
    call();
  } catch (const std::bad_alloc&) {
    a.threw = true;
  }
  left = -1;
  a.failed = failed;
  a.state_kept = float_state() == state;
  a.over_threads = runs_over_threads - before;
  for (const Result& r : results) a.bytes.push_back(*r.got ? r.got->bytes() : "");
  return a;
}

}  // namespace

void verify(const Case& c, const char* entry, std::initializer_list<Result> results,
            const std::function<void()>& call) {
  const bool in_place = std::string(entry).ends_with("in place");
  for (mk::Isa isa : {instruction_sets().front(), instruction_sets().back()}) {
    for (int threads : {1, 4}) {
      auto wrong = [&](int64_t fail_at, const std::string& what) {
        std::printf("FAIL %s %s, %d threads, allocation %lld, %s: %s\n", entry, name_of(isa), threads,
                    (long long)fail_at, c.text().c_str(), what.c_str());
        ++tally.failures;
      };
      use(isa, threads);
      // A thread of its own for every attempt: its scratch memory is not there yet.
      auto afresh = [](auto&& body) { std::thread(body).join(); };
      Attempt whole;
      afresh([&] { whole = attempt(results, call, -1); });
      for (const Result& r : results) {
        if (!*r.got) continue;
        const std::string what = difference(*r.got, *r.want, tolerance(c, entry, isa, r));
        if (!what.empty()) wrong(-1, r.name + (": " + what));
      }
      Attempt first;
      // Beyond the first twenty one in eight: they are of a kind, one per task.
      for (int64_t at = 0;; at += at < 20 ? 1 : 1 + at / 8) {
        Attempt broken, next;
        afresh([&] {
          broken = attempt(results, call, at);
          // Some failures on: what each leaves behind adds up. What was allocated before may be there now; then they come earlier.
          for (int64_t i = 0; i < 7 && broken.failed; ++i) attempt(results, call, at - (i < 3 ? 0 : i % (at + 1)));
          next = attempt(results, call, -1);
        });
        ++tally.runs;
        if (broken.failed != broken.threw) wrong(at, "an allocation failed and the call did not");
        if (!broken.state_kept) wrong(at, "the floating-point state of the thread is another");
        if (next.threw || next.bytes != whole.bytes) wrong(at, "the next call gives another result");
        if (next.over_threads != whole.over_threads) wrong(at, "the next call runs over other threads");
        if (!broken.failed) break;
        if (at == 0) first = broken;
        // The retained factors beside the memory are a result like others.
        if (in_place && broken.bytes[0] != first.bytes[0]) wrong(at, "the memory is half written");
      }
    }
  }
}

}  // namespace native

namespace torch::stable {

uint32_t get_num_threads() { return uint32_t(native::wanted_threads()); }

// Range after range to threads of their own. What leaves one of them ends the program, as with OpenMP.
void parallel_for(int64_t begin, int64_t end, int64_t, mk::FunctionRef<void(int64_t, int64_t)> body) {
  ++native::runs_over_threads;
  native::spared = true;
  {
    std::vector<std::thread> threads;
    for (int64_t i = begin + 1; i < end; ++i) threads.emplace_back([&body, i] { body(i, i + 1); });
    native::spared = false;
    body(begin, begin + 1);
    native::spared = true;
    for (std::thread& t : threads) t.join();
  }
  native::spared = false;
}

}  // namespace torch::stable

void* operator new(size_t bytes) {
  void* memory = native::take(bytes, alignof(std::max_align_t));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  return native::take(bytes, alignof(std::max_align_t));
}
void* operator new(size_t bytes, std::align_val_t align) {
  void* memory = native::take(bytes, size_t(align));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void* operator new(size_t bytes, std::align_val_t align, const std::nothrow_t&) noexcept {
  return native::take(bytes, size_t(align));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
