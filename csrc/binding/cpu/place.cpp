#include <torch/csrc/stable/ops.h>

#include "binding/binding.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace mk {

// Pages of a fresh result are made when they are first written, 4 KiB at a time (what that costs: bench/results/ladder.json).
void want_huge_pages([[maybe_unused]] char* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr size_t kLarge = size_t(4) << 20;
  if (bytes < kLarge) return;
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), gap = (page - reinterpret_cast<size_t>(data) % page) % page;
  madvise(data + gap, (bytes - gap) / page * page, MADV_HUGEPAGE);  // a wish: refused, nothing changes
#endif
}

Tensor empty(const Sizes& sizes, ScalarType dtype, bool whole) {
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes.data(), sizes.size());
  Tensor t = made(bytes_of(sizes, dtype), [&] { return torch::stable::empty(shape, dtype); });
  if (whole) want_huge_pages(static_cast<char*>(t.mutable_data_ptr()), size_t(t.numel()) * t.element_size());
  return t;
}

Tensor aid(const Sizes& sizes, ScalarType dtype) {
  Sizes strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * most(sizes[d], 1);
  return made(bytes_of(sizes, dtype), [&] {
    AtenTensorHandle made_here = nullptr;
    const int32_t number = dtype == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), number,
                                                    aoti_torch_device_type_cpu(), 0, &made_here));
    return Tensor(made_here);
  });
}

void Place::enter(const char* op, const char* name, const Tensor& t) {
  check(t.is_cpu(), op, ": ", name, " must be on the CPU");
}

}  // namespace mk
