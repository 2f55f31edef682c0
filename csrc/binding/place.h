// Where a call runs: what the bindings ask of a device, the same question for every backend. csrc/binding/cpu/place.cpp answers it for the
// CPU, csrc/binding/cuda/place.cpp for a GPU.
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

// Asks for pages of 2 MiB where the system leaves that to the program (transparent_hugepage: madvise). Small pieces are left alone.
void want_huge_pages(char* data, size_t bytes);

// Bytes of a tensor of these sizes, kTooManyBytes where they cannot be counted.
inline size_t bytes_of(const Sizes& sizes, ScalarType dtype) {
  size_t bytes = aoti_torch_dtype_element_size(int32_t(dtype));
  for (int64_t size : sizes) bytes = bytes_of(bytes, size_t(size));
  return bytes;
}
inline size_t bytes_of(const Tensor& t) { return bytes_of(size_t(t.numel()), t.element_size()); }

// What `make` returns, which asks torch for `bytes` of memory. torch's C interface tells of a failure and not of which: with
// arguments that have been checked, there was no memory.
template <class Make>
Tensor made(size_t bytes, Make&& make) {
  if (bytes >= kTooManyBytes) throw OutOfMemory(bytes);
  try {
    return make();
  } catch (const std::exception&) {
    throw OutOfMemory(bytes);
  }
}

// A fresh, uninitialised tensor on the device of the call. `whole`: all of it will be written.
Tensor empty(const Sizes& sizes, ScalarType dtype, bool whole = true);

// The same, in float32 or float64, for what the backward pass alone will read. On the CPU it is made past torch's
// dispatcher, which takes a tenth of a small call; so torch does not fill it with NaN where it is told to fill new
// memory, and tests see it by the gradients.
Tensor aid(const Sizes& sizes, ScalarType dtype);

// Makes the device of the first tensor of a call the current one, until the call ends.
class Place {
 public:
  void enter(const char* op, const char* name, const Tensor& t);

 private:
  bool entered_ = false;
  std::shared_ptr<void> scope_;
};

#ifdef MK_CUDA
constexpr bool kSumsInKernels = false, kDoubles = false, kCompressedSlots = false;

// What launchers need of torch: the current stream, and scratch memory of torch's allocator that lives until the kernels are
// in the stream.
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
constexpr bool kSumsInKernels = true, kDoubles = true, kCompressedSlots = true;
#endif

}  // namespace mk
