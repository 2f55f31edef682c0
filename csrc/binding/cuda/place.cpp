// The GPU side of csrc/binding/place.h. Under MK_SIMT kernels run on the CPU (tests/simt), and tensors are CPU tensors.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "binding/binding.h"
#include "binding/chosen_slots.h"

#ifndef MK_SIMT
// torch declares it only if built with CUDA. This library is compiled with any torch; CMakeLists.txt links the symbol.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace mk {

Tensor empty(const Sizes& sizes, ScalarType dtype, bool) {
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes.data(), sizes.size());
#ifdef MK_SIMT
  return made(bytes_of(sizes, dtype), [&] { return torch::stable::empty(shape, dtype); });
#else
  const auto device =
      torch::stable::Device(torch::headeronly::DeviceType::CUDA, torch::stable::accelerator::getCurrentDeviceIndex());
  try {
    return made(bytes_of(sizes, dtype), [&] { return torch::stable::empty(shape, dtype, std::nullopt, device); });
  } catch (const OutOfMemory&) {
    cuda::check(cudaPeekAtLastError(), "allocation");  // an error of an earlier kernel is reported at the next call
    throw;
  }
#endif
}

Tensor as_rows(const Tensor& t) {
  return made(bytes_of(t), [&] { return torch::stable::contiguous(t); });
}

void Place::enter(const char* op, const char* name, const Tensor& t) {
#ifdef MK_SIMT
  check(t.is_cpu(), op, ": ", name, " must be on the CPU");
#else
  check(t.is_cuda(), op, ": ", name, " must be on a CUDA device");
  const int32_t index = t.get_device();
  if (!entered_) {
    scope_ = std::make_shared<torch::stable::accelerator::DeviceGuard>(index);
  } else {
    check(index == torch::stable::accelerator::getCurrentDeviceIndex(), op, ": ", name,
          " must be on the device of the other arguments");
  }
#endif
  entered_ = true;
}

Launching::Launching() {
  device_.owner = this;
  device_.allocate = scratch;
  device_.allows_tf32 = allows_tf32;
#ifndef MK_SIMT
  const int32_t index = torch::stable::accelerator::getCurrentDeviceIndex();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  device_.stream = static_cast<cudaStream_t>(stream);
  cuda::describe(index, device_);
#endif
}

void* Launching::scratch(void* self, int64_t bytes) {
  auto& memory = static_cast<Launching*>(self)->memory_;
  memory.push_back(empty({most(bytes, 1)}, ScalarType::Byte));
  return memory.back().data_ptr();
}

// The C interface does not have this setting; memkernels/_cuda.py defines an operator that returns it.
bool Launching::allows_tf32(void*) {
  StableIValue answer = 0;
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("memkernels_cuda::allows_tf32", "", &answer, TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(answer);
}

// Checking indices would make the host wait for the GPU. Kernels never read outside the memory instead: such an index
// reads as NaN.
void check_indices(const char*, const Choice&, const char*) {}

bool zero_pages(char*, size_t, size_t, size_t) { return false; }

}  // namespace mk
