// Runs tasks on torch's threads. Each thread keeps its scratch memory for the next call.
#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "cpu/tiles/parallel.h"

namespace mk {
namespace {

class Scratch {
 public:
  ~Scratch() { drop(); }
  char* at_least(size_t bytes) {
    if (bytes > size_) {
      drop();
      data_ = static_cast<char*>(allocate(bytes));
      size_ = bytes;
    }
    return data_;
  }

 private:
  void drop() {
    release(data_);
    data_ = nullptr;
    size_ = 0;
  }
  char* data_ = nullptr;
  size_t size_ = 0;
};

// One per nesting depth: a task may itself run tasks, which need other scratch memory.
thread_local Scratch scratch[3];
thread_local int depth = 0;

// Counts this thread's nesting depth, also when a task throws.
struct Deeper {
  Deeper() { ++depth; }
  ~Deeper() { --depth; }
  Deeper(const Deeper&) = delete;
  Deeper& operator=(const Deeper&) = delete;
};

}  // namespace

void run_tasks_here(int64_t tasks, size_t bytes, void* context, TaskFunction function) {
  char* memory = scratch[depth].at_least(bytes);
  const Deeper deeper;
  for (int64_t task = 0; task < tasks; ++task) function(context, task, memory);
}

void run_tasks(int64_t tasks, size_t bytes, void* context, TaskFunction function) {
  const int64_t threads = tasks <= 1 || depth > 0 ? 1 : int64_t(torch::stable::get_num_threads());
  if (threads <= 1) return run_tasks_here(tasks, bytes, context, function);
  const int64_t workers = tasks < threads ? tasks : threads;
  // One piece for each worker. torch numbers the workers, so the caller allocates all pieces before any of them starts,
  // where a failure can still be reported.
  const size_t piece = (bytes + 63) / 64 * 64;
  char* memory = scratch[0].at_least(bytes_of(piece, size_t(workers)));
  std::atomic<int64_t> next{0};
  // Kernels throw only std::bad_alloc, and it must not leave a thread of torch's. It is passed on by value rather than
  // as std::exception_ptr: torch exports the functions of that class without a symbol version.
  std::atomic<bool> failed{false};
  std::atomic<size_t> missing{0};
  auto stop = [&](size_t missing_bytes) {
    missing = missing_bytes;
    failed = true;
    next = tasks;  // stops the other workers
  };
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    const Deeper deeper;
    try {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        function(context, task, memory + size_t(worker) * piece);
      }
    } catch (const OutOfMemory& e) {
      stop(e.bytes());
    } catch (const std::bad_alloc&) {
      stop(0);
    }
  });
  if (failed) throw OutOfMemory(missing);
}

}  // namespace mk
