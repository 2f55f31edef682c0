// Tasks over torch's threads, each with scratch memory that it keeps for the next call.
#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <new>

namespace mk {
namespace {

class Scratch {
 public:
  ~Scratch() { release(); }
  char* at_least(size_t bytes) {
    if (bytes > size_) {
      release();
      data_ = static_cast<char*>(::operator new(bytes, std::align_val_t(64)));
      size_ = bytes;
    }
    return data_;
  }

 private:
  void release() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t(64));
    data_ = nullptr;
    size_ = 0;
  }
  char* data_ = nullptr;
  size_t size_ = 0;
};

// By depth: a task may itself run tasks, which then need scratch of their own.
thread_local Scratch scratch[3];
thread_local int depth = 0;

}  // namespace

void run_tasks_here(int64_t tasks, size_t bytes, void* context, TaskFunction function) {
  char* memory = scratch[depth].at_least(bytes);
  ++depth;
  for (int64_t task = 0; task < tasks; ++task) function(context, task, memory);
  --depth;
}

void run_tasks(int64_t tasks, size_t bytes, void* context, TaskFunction function) {
  const int64_t threads = tasks <= 1 || depth > 0 ? 1 : int64_t(torch::stable::get_num_threads());
  if (threads <= 1) return run_tasks_here(tasks, bytes, context, function);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, tasks < threads ? tasks : threads, 1, [&](int64_t, int64_t) {
    char* memory = scratch[depth].at_least(bytes);
    ++depth;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) function(context, task, memory);
    --depth;
  });
}

}  // namespace mk
