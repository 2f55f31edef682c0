#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "binding/binding.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace mk {

// The system creates pages of a fresh result at the first write, 4 KiB at a time. bench/results/ladder.json has the
// cost.
void advise_huge_pages([[maybe_unused]] char* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr size_t kLarge = size_t(4) << 20;
  if (bytes < kLarge) return;
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), gap = (page - reinterpret_cast<size_t>(data) % page) % page;
  madvise(data + gap, (bytes - gap) / page * page, MADV_HUGEPAGE);  // advice: if refused, nothing changes
#endif
}

Tensor empty(const Sizes& sizes, ScalarType dtype, bool whole) {
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes.data(), sizes.size());
  Tensor t = made(bytes_of(sizes, dtype), [&] { return torch::stable::empty(shape, dtype); });
  if (whole) advise_huge_pages(static_cast<char*>(t.mutable_data_ptr()), size_t(t.numel()) * t.element_size());
  return t;
}

Tensor empty_saved(const Sizes& sizes, ScalarType dtype) {
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

Tensor as_rows(const Tensor& t) {
  const auto sizes = t.sizes(), given = t.strides();
  bool one = t.numel() > 0;
  for (size_t d = 0; d < sizes.size(); ++d) one &= sizes[d] == 1 || given[d] == 0;
  if (!one) return made(bytes_of(t), [&] { return torch::stable::contiguous(t); });
  Sizes strides(sizes.size(), 0);
  strides.back() = 1;
  const size_t item = t.element_size();
  Tensor row = made(size_t(sizes.back()) * item, [&] {
    AtenTensorHandle made_here = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                    int32_t(t.scalar_type()), aoti_torch_device_type_cpu(), 0,
                                                    &made_here));
    return Tensor(made_here);
  });
  char* to = static_cast<char*>(row.mutable_data_ptr());
  for (int64_t i = 0; i < sizes.back(); ++i) std::memcpy(to + size_t(i) * item, t.data_ptr(), item);
  return row;
}

void Place::enter(const char* op, const char* name, const Tensor& t) {
  check(t.is_cpu(), op, ": ", name, " must be on the CPU");
}

}  // namespace mk
