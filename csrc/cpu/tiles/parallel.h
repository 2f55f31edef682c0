// Runs tasks on threads. The result of a task does not depend on the thread that runs it or on their number, so results
// have the same bits for any number of threads. Tasks are handed out one at a time in increasing order to the next free
// thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>
#include <utility>

#include "params/memory.h"

namespace mk {

// 64-byte aligned memory; throws OutOfMemory.
inline void* allocate(size_t bytes) {
  void* memory = bytes >= kTooManyBytes ? nullptr : ::operator new(bytes, std::align_val_t(64), std::nothrow);
  if (memory == nullptr) throw OutOfMemory(bytes);
  return memory;
}
inline void release(void* memory) { ::operator delete(memory, std::align_val_t(64)); }

using TaskFunction = void (*)(void* context, int64_t task, char* scratch);

// Runs function(context, task, scratch) for every task in [0, tasks). scratch is 64-byte aligned memory of the running
// thread, allocated for all threads before the first task: if that throws OutOfMemory, no task has written anything. A
// std::bad_alloc thrown by a task reaches the caller as OutOfMemory once all threads have stopped. The program that
// links the kernels defines this function; the operator library uses torch's threads.
void run_tasks(int64_t tasks, size_t scratch_bytes, void* context, TaskFunction function);

// The same on the calling thread only.
void run_tasks_here(int64_t tasks, size_t scratch_bytes, void* context, TaskFunction function);

// Work that moves fewer bytes than this is done by one thread before a second has woken: a gated_scan of 192 KiB on
// Zen 4 takes 3 us on one thread and 11 on two.
constexpr int64_t kBytesOfOneThread = 256 << 10;

// bytes: what the tasks move together, where that is what they wait for.
template <class Body>
void parallel(int64_t tasks, size_t scratch_bytes, Body&& body, int64_t bytes = kBytesOfOneThread) {
  using Plain = std::remove_reference_t<Body>;
  const auto run = bytes < kBytesOfOneThread ? run_tasks_here : run_tasks;
  run(tasks, scratch_bytes, const_cast<std::remove_const_t<Plain>*>(&body),
      [](void* context, int64_t task, char* scratch) { (*static_cast<Plain*>(context))(task, scratch); });
}

// Non-owning reference to a callable, which must outlive the call. Code that takes one is compiled once for all
// callables.
template <class Signature>
class FunctionRef;
template <class... A>
class FunctionRef<void(A...)> {
 public:
  template <class Body>
    requires std::is_invocable_v<Body&, A...>
  FunctionRef(Body&& body)
      : context_(const_cast<void*>(static_cast<const void*>(&body))), call_([](void* context, A... arguments) {
          (*static_cast<std::remove_reference_t<Body>*>(context))(arguments...);
        }) {}
  void operator()(A... arguments) const { call_(context_, arguments...); }

 private:
  void* context_;
  void (*call_)(void*, A...);
};

// Hands out consecutive, 64-byte aligned pieces of a thread's scratch memory. Without memory, it only counts bytes.
class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    char* p = base_ + used_;
    used_ = least_bytes(used_ + (bytes_of(size_t(count), sizeof(T)) + 63) / 64 * 64);
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(p);
  }
  size_t used() const { return used_; }

 private:
  static size_t least_bytes(size_t bytes) { return bytes < kTooManyBytes ? bytes : kTooManyBytes; }
  char* base_;
  size_t used_ = 0;
};

}  // namespace mk
