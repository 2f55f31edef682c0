#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <mutex>
#include <new>
#include <thread>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, bytes) ((void)(begin), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(begin, bytes) ((void)(begin), (void)(bytes))
#endif

#include "cpu/tiles/parallel.h"

namespace native {

namespace {

thread_local bool inside = false;

// Threads that wait for one job at a time.
class Pool {
 public:
  static constexpr int kThreads = 4;

  Pool() {
    for (int i = 1; i < kThreads; ++i) threads_.emplace_back([this, i] { serve(i); });
  }
  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& t : threads_) t.join();
  }
  // job(i) on every thread i.
  void run(const std::function<void(int)>& job) {
    {
      std::lock_guard lock(mutex_);
      job_ = &job;
      ++round_;
      busy_ = kThreads - 1;
    }
    wake_.notify_all();
    job(0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void serve(int i) {
    for (int64_t seen = 0;;) {
      const std::function<void(int)>* job;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || round_ != seen; });
        if (stop_) return;
        seen = round_;
        job = job_;
      }
      (*job)(i);
      std::lock_guard lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int)>* job_ = nullptr;
  int64_t round_ = 0;
  int busy_ = 0;
  bool stop_ = false;
};

// Scratch memory of exactly the size asked for, new and poisoned for every task: a kernel that counts on what an
// earlier task left, or that writes behind its end, is found.
void run_one(int64_t task, size_t bytes, void* context, mk::TaskFunction function) {
  char* memory = static_cast<char*>(::operator new(bytes, std::align_val_t(64)));
  std::memset(memory, 0xff, bytes);
  // The seeded fault forbids the second half instead of allocating less: a write far behind an allocation may meet an
  // unmapped page first, and then it is not the sanitizer that notices.
  const size_t forbidden = fault == "scratch" ? bytes / 2 : 0;
  ASAN_POISON_MEMORY_REGION(memory + bytes - forbidden, forbidden);
  const bool outer = inside;
  inside = true;
  function(context, task, memory);
  inside = outer;
  ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
  ::operator delete(memory, std::align_val_t(64));
}

}  // namespace

}  // namespace native

namespace mk {

void run_tasks_here(int64_t tasks, size_t bytes, void* context, TaskFunction function) {
  for (int64_t task = 0; task < tasks; ++task) native::run_one(task, bytes, context, function);
}

// Thread i begins with task i, so that several threads take part however short the tasks are; then whoever is free
// takes the next.
void run_tasks(int64_t tasks, size_t bytes, void* context, TaskFunction function) {
  if (tasks <= 1 || native::wanted_threads() == 1 || native::inside) {
    return run_tasks_here(tasks, bytes, context, function);
  }
  static native::Pool pool;
  std::atomic<int64_t> next{native::Pool::kThreads};
  pool.run([&](int thread) {
    if (native::fault == "race") {
      if (thread < 2) run_tasks_here(tasks, bytes, context, function);
      return;
    }
    for (int64_t task = thread; task < tasks; task = next.fetch_add(1, std::memory_order_relaxed)) {
      native::run_one(task, bytes, context, function);
    }
  });
}

}  // namespace mk
