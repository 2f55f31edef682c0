// What the bindings of the writes share: the kernel that a call takes, and writing into the memory itself.
#pragma once

#include "binding/binding.h"
#include "params/gated_write.h"

namespace mk {

// Runs the closed form, or the scan for an erase vector.
void run_write(const GatedWrite& p);
void run_write_backward(const GatedWriteBackward& b);

// `erase` (or its number) and `token_mask` are what a kernel takes them for.
void check_write(const Arguments& args, const std::optional<Tensor>& token_mask, double erase_scale);

// `values` may be written in place: it has all `sizes`, and no two of its elements share memory.
void check_target(const Arguments& args, const Tensor& values, const Sizes& sizes);
// Where the last dimension of `values` has a stride, kernels wrote a copy: it goes back.
void settle_target(const Tensor& written, const Tensor& values);

// The gradient of the written values; zero where nobody has one.
Tensor upstream(const std::optional<Tensor>& d_values, const Sizes& sizes, ScalarType dtype);

}  // namespace mk
