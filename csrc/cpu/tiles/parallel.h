// Tasks over threads. What a task computes never depends on which thread runs it or on how many there are, so results are the
// same bits for any number of threads. Tasks are handed out in increasing order, one at a time, whoever is free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>
#include <utility>

#include "params/memory.h"

namespace mk {

// 64-byte aligned memory, or OutOfMemory.
inline void* allocate(size_t bytes) {
  void* memory = bytes >= kTooManyBytes ? nullptr : ::operator new(bytes, std::align_val_t(64), std::nothrow);
  if (memory == nullptr) throw OutOfMemory(bytes);
  return memory;
}
inline void release(void* memory) { ::operator delete(memory, std::align_val_t(64)); }

using TaskFunction = void (*)(void* context, int64_t task, char* scratch);

// Run function(context, task, scratch) for every task in [0, tasks); scratch is 64-byte aligned memory of the running
// thread, and of all threads before the first task: OutOfMemory leaves what tasks write as it was. The std::bad_alloc
// of a task reaches the caller as OutOfMemory, once all threads have stopped. Supplied by the program that links the
// kernels: the operator library uses torch's threads.
void run_tasks(int64_t tasks, size_t scratch_bytes, void* context, TaskFunction function);

// The same on the calling thread alone.
void run_tasks_here(int64_t tasks, size_t scratch_bytes, void* context, TaskFunction function);

template <class Body>
void parallel(int64_t tasks, size_t scratch_bytes, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  run_tasks(tasks, scratch_bytes, const_cast<std::remove_const_t<Plain>*>(&body),
            [](void* context, int64_t task, char* scratch) { (*static_cast<Plain*>(context))(task, scratch); });
}

// A callable that outlives the call it is passed to: so that what calls it is compiled once, whoever passes it.
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

// Hands out consecutive, 64-byte aligned pieces of a thread's scratch memory. With no memory behind it, it measures.
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
