// Tasks over torch's threads, each with scratch memory that it keeps for the next call.
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

// By depth: a task may itself run tasks, which then need scratch of their own.
thread_local Scratch scratch[3];
thread_local int depth = 0;

// While alive, this thread runs tasks, however they end.
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
  // A piece for every worker. torch numbers their ranges, so none needs to be allocated where nobody could be told of a failure.
  const size_t piece = (bytes + 63) / 64 * 64;
  char* memory = scratch[0].at_least(bytes_of(piece, size_t(workers)));
  std::atomic<int64_t> next{0};
  // Kernels throw nothing but std::bad_alloc, which must not leave a thread of torch's. By value: the functions of
  // std::exception_ptr are among those that torch exports, under no version.
  std::atomic<bool> failed{false};
  std::atomic<size_t> missing{0};
  auto stop = [&](size_t missing_bytes) {
    missing = missing_bytes;
    failed = true;
    next = tasks;  // the others stop too
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
