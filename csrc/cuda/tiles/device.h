// The device of a call as launchers see it, and kernel launches.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef MK_SIMT
#include "simt.h"
#else
#include <cuda_runtime.h>
#endif

#include "params/view.h"

namespace mk::cuda {

struct Device {
  cudaStream_t stream = nullptr;
  int sms = 4;                         // multiprocessors
  int64_t shared = int64_t(96) << 10;  // bytes of shared memory that one block may have
  void* owner = nullptr;
  void* (*allocate)(void* owner, int64_t bytes) = nullptr;
  bool (*allows_tf32)(void* owner) = nullptr;  // whether float32 products may be rounded to tf32

  // Memory that lives until all kernels of this call are in the stream; aligned to 256 bytes, uninitialised.
  template <class T>
  T* scratch(int64_t count) const {
    return static_cast<T*>(allocate(owner, count * int64_t(sizeof(T))));
  }
};

// Fills in the properties of device `index`.
void describe(int index, Device& device);

// On an error, throws `what` with CUDA's message.
void check(cudaError_t status, const char* what);

// Launches `kernel` into the stream: `blocks` blocks of `threads` threads with `shared` bytes of shared memory.
template <class... P>
void launch(const Device& device, const char* name, void (*kernel)(P...), int64_t blocks, int threads, int64_t shared,
            const std::decay_t<P>&... args) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff || shared > device.shared) {
    throw std::runtime_error(std::string(name) + ": the shape is too large for its CUDA kernel (" +
                             std::to_string(blocks) + " blocks, " + std::to_string(shared) +
                             " bytes of shared memory)");
  }
#ifdef MK_SIMT
  simt::launch(blocks, threads, shared, [&] { kernel(args...); });
#else
  if (shared > 48 << 10) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shared)),
          name);
  }
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(unsigned(threads)),
                         pointers, size_t(shared), device.stream),
        name);
#endif
}

}  // namespace mk::cuda
