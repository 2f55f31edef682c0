// Shared by the bindings of the writes: the choice of kernel, and writes into the memory itself.
#pragma once

#include "binding/binding.h"
#include "params/gated_write.h"

namespace mk {

// Runs the closed form, or the scan if erase is a vector.
void run_write(const GatedWrite& p);
void run_write_backward(const GatedWriteBackward& b);

// Checks `token_mask` and the number `erase_scale`.
void check_write(const Arguments& args, const std::optional<Tensor>& token_mask, double erase_scale);

// Checks that `values` may be written in place: it has all `sizes`, and no two of its elements overlap.
void check_target(const Arguments& args, const Tensor& values, const Sizes& sizes);
// Copies the result back if kernels wrote into a copy because the last dimension of `values` is not contiguous.
void settle_target(const Tensor& written, const Tensor& values);

// The gradient of the new values; zero if there is none.
Tensor upstream(const std::optional<Tensor>& d_values, const Sizes& sizes, ScalarType dtype);

}  // namespace mk
