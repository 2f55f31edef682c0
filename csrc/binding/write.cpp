#include "binding/write.h"

#include <algorithm>
#include <utility>

namespace mk {

void run_write(const GatedWrite& p) {
  if (p.lead.batches() * p.N == 0) return;
  if (p.erase) MK_CALL(gated_write_scan, p);
  else MK_CALL(gated_write, p);
}

void run_write_backward(const GatedWriteBackward& b) {
  if (b.forward.erase) MK_CALL(gated_write_scan_backward, b);
  else MK_CALL(gated_write_backward, b);
}

void check_write(const Arguments& args, const std::optional<Tensor>& token_mask, double erase_scale) {
  args.require(!token_mask.has_value() || token_mask->scalar_type() == ScalarType::Bool, "token_mask must be bool");
  args.require(erase_scale >= 0 && erase_scale <= 1, "erase must be in [0, 1]");
}

void check_target(const Arguments& args, const Tensor& values, const Sizes& sizes) {
  int64_t elements = 1;
  for (int64_t s : sizes) elements *= s;
  args.require(elements == values.numel(), "values must have all leading dimensions of the memory");
  // From the smallest stride to the largest, a step leads beyond all that the dimensions before it reach.
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (int64_t d = 0; d < values.dim() && elements > 0; ++d) {
    if (values.size(d) > 1) steps.emplace_back(values.stride(d), values.size(d));
  }
  std::sort(steps.begin(), steps.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : steps) {
    args.require(stride > reach, "values must not be expanded, nor overlap themselves");
    reach += (size - 1) * stride;
  }
}

void settle_target(const Tensor& written, const Tensor& values) {
  if (written.data_ptr() == values.data_ptr()) return;
  Tensor target = values;
  torch::stable::copy_(target, written);
}

Tensor upstream(const std::optional<Tensor>& d_values, const Sizes& sizes, ScalarType dtype) {
  if (d_values.has_value()) return *d_values;
  Tensor zeros = empty(sizes, dtype);
  return torch::stable::zero_(zeros);
}

}  // namespace mk
