// What the bindings of the ops that work on chosen slots share: the check of indices, gradients that are mostly zero.
#pragma once

#include "binding/binding.h"
#include "params/choice.h"

namespace mk {

void check_indices(const char* op, const Choice& c, const char* argument = "indices");

// Makes a fresh, large piece of memory zero without writing it: pages handed back to the system are zero when they are
// next touched. Filling it would cost most of a backward that touches a few rows. At most `rows` rows of `row_bytes` will be
// touched, here and there. False: it is not known to be zero.
bool zero_pages(char* data, size_t bytes, size_t rows, size_t row_bytes);

// The gradient of a memory argument that a kernel writes whole, in the dtype of the argument.
class ChosenGradient {
 public:
  // `tail`: 2 for rows, 1 for one number per slot. Not wanted: it stays empty. `chosen`: the indices.
  ChosenGradient(const Arguments& args, const Tensor* argument, bool wanted, int tail, const Tensor& chosen) {
    if (argument == nullptr || !wanted) return;
    Sizes sizes;
    for (int64_t s : argument->sizes()) sizes.push_back(s);
    tensor_ = mk::empty(sizes, argument->scalar_type(), false);
    out_.view = args.view(*tensor_, tail);
    out_.rows = 1;
    for (size_t d = 0; d + size_t(tail) - 1 < sizes.size(); ++d) out_.rows *= sizes[d];
    const size_t bytes = size_t(tensor_->numel() * size_of(out_.view.dtype));
    out_.zero = zero_pages(out_.view.data, bytes, size_t(chosen.numel()), bytes / size_t(most(out_.rows, 1)));
  }
  const MemoryGradient& out() const { return out_; }
  Tensor result() const { return tensor_.has_value() ? *tensor_ : nothing(); }

 private:
  std::optional<Tensor> tensor_;
  MemoryGradient out_;
};

}  // namespace mk
