#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

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

namespace {

std::atomic<bool> fills{false};
std::atomic<int64_t> filled{0};

// By the C shim and not by torch's dispatcher, which took 0.8 us of a call of 5. So torch's option to fill new memory
// has no effect here, and there is a switch for tests.
Tensor allocated(const Sizes& sizes, const Sizes& strides, ScalarType dtype) {
  AtenTensorHandle made_here = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), int32_t(dtype),
                                                  aoti_torch_device_type_cpu(), 0, &made_here));
  return Tensor(made_here);
}

// NaN, and the largest int64: no index names such a slot.
void fill(Tensor& t) {
  ++filled;
  char* data = static_cast<char*>(t.mutable_data_ptr());
  const size_t count = size_t(t.numel());
  if (t.scalar_type() != ScalarType::Long) return void(std::memset(data, 0xff, count * t.element_size()));
  std::fill_n(reinterpret_cast<int64_t*>(data), count, std::numeric_limits<int64_t>::max());
}

}  // namespace

int64_t fill_new_memory(bool on) {
  fills = on;
  return filled;
}

Tensor empty(const Sizes& sizes, ScalarType dtype, bool whole) {
  Sizes strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * most(sizes[d], 1);
  const size_t bytes = bytes_of(sizes, dtype);
  Tensor t = made(bytes, [&] { return allocated(sizes, strides, dtype); });
  if (whole) advise_huge_pages(static_cast<char*>(t.mutable_data_ptr()), bytes);
  if (fills) fill(t);
  return t;
}

Tensor as_rows(const Tensor& t) {
  const auto sizes = t.sizes(), given = t.strides();
  bool one = t.numel() > 0;
  for (size_t d = 0; d < sizes.size(); ++d) one &= sizes[d] == 1 || given[d] == 0;
  if (!one) return made(bytes_of(t), [&] { return torch::stable::contiguous(t); });
  Sizes strides(sizes.size(), 0);
  strides.back() = 1;
  const size_t item = t.element_size();
  Tensor row = made(size_t(sizes.back()) * item,
                    [&] { return allocated({sizes.begin(), sizes.end()}, strides, t.scalar_type()); });
  char* to = static_cast<char*>(row.mutable_data_ptr());
  for (int64_t i = 0; i < sizes.back(); ++i) std::memcpy(to + size_t(i) * item, t.data_ptr(), item);
  return row;
}

void Place::enter(const char* op, const char* name, const Tensor& t) {
  check(t.is_cpu(), op, ": ", name, " must be on the CPU");
}

}  // namespace mk
