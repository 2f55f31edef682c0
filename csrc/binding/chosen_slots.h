// Shared by the bindings of ops on chosen slots: the check of indices, and gradients that are mostly zero.
#pragma once

#include "binding/binding.h"
#include "params/choice.h"

namespace mk {

// Raises the error of an index that is out of range, if `wrong` is not -1.
inline void check_index(const char* op, const Choice& c, int64_t wrong, const char* argument = "indices") {
  check(wrong == -1, op, ": ", argument, " must be in [-1, ", c.N, "), got ", wrong);
}
void check_indices(const char* op, const Choice& c, const char* argument = "indices");

// Zeroes a large fresh allocation without writing it: pages that were given back to the system are zero when they are
// next touched. Filling them would be most of the cost of a backward that touches few rows. The caller will write at
// most `rows` scattered rows of `row_bytes`, which decides on huge pages. Returns false if the memory may not be zero.
bool zero_pages(char* data, size_t bytes, size_t rows, size_t row_bytes);

// The gradient of a memory argument, written whole by a kernel in the dtype of the argument.
class ChosenGradient {
 public:
  // `tail`: 2 for rows, 1 for one number per slot. Stays empty if not wanted. `chosen`: the indices.
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
