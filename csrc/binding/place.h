// What the bindings need from a device, with the same interface for every backend. csrc/binding/cpu/place.cpp has the
// CPU, csrc/binding/cuda/place.cpp the GPU.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <exception>
#include <memory>
#include <vector>

#include "params/memory.h"

#ifdef MK_CUDA
#include "cuda/tiles/device.h"
#endif

namespace mk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// Advises the system to use huge pages of 2 MiB, where it leaves that to the program (transparent_hugepage: madvise).
// Does nothing for small allocations.
void advise_huge_pages(char* data, size_t bytes);

// Bytes of a tensor of these sizes; kTooManyBytes if they overflow.
inline size_t bytes_of(const Sizes& sizes, ScalarType dtype) {
  size_t bytes = aoti_torch_dtype_element_size(int32_t(dtype));
  for (int64_t size : sizes) bytes = bytes_of(bytes, size_t(size));
  return bytes;
}
inline size_t bytes_of(const Tensor& t) { return bytes_of(size_t(t.numel()), t.element_size()); }

// Returns make(), which lets torch allocate `bytes`. torch's C interface reports that it failed but not why. The
// arguments have been checked, so memory was missing.
template <class Make>
Tensor made(size_t bytes, Make&& make) {
  if (bytes >= kTooManyBytes) throw OutOfMemory(bytes);
  try {
    return make();
  } catch (const std::exception&) {
    throw OutOfMemory(bytes);
  }
}

// A new, uninitialised tensor on the device of the call. `whole`: all of it will be written.
Tensor empty(const Sizes& sizes, ScalarType dtype, bool whole = true);

// For tests, on the CPU: are new tensors filled from now on, with NaN or the largest int64? Returns how many were until
// now.
int64_t fill_new_memory(bool on);

// `t` with a contiguous last dimension: a copy, if it has another. One number that is expanded to all of them, such as
// the gradient of a sum, is copied to one row, which is expanded.
Tensor as_rows(const Tensor& t);

// Makes the device of the first tensor of a call current until the call ends.
class Place {
 public:
  void enter(const char* op, const char* name, const Tensor& t);

 private:
  bool entered_ = false;
  std::shared_ptr<void> scope_;
};

#ifdef MK_CUDA
constexpr bool kSumsInKernels = false, kDoubles = false, kCompressedSlots = false, kWeighsInOnePass = false;

// What launchers need from torch: the current stream, and scratch memory from torch's allocator. The scratch lives
// until the kernels have been put into the stream.
class Launching {
 public:
  Launching();
  const cuda::Device& device() const { return device_; }

 private:
  static void* scratch(void* self, int64_t bytes);
  static bool allows_tf32(void* self);
  cuda::Device device_;
  std::vector<Tensor> memory_;
};
#else
constexpr bool kSumsInKernels = true, kDoubles = true, kCompressedSlots = true, kWeighsInOnePass = true;
#endif

}  // namespace mk
