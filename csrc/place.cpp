#include <torch/csrc/stable/ops.h>

#include "binding.h"

namespace mk {

Tensor empty(const Sizes& sizes, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype);
}

void Place::enter(const char* op, const char* name, const Tensor& t) {
  check(t.is_cpu(), op, ": ", name, " must be on the CPU");
}

}  // namespace mk
