// What the backward pass of a softmax-weighted read gets beside the inputs of the forward pass.
#pragma once

#include "binding/binding.h"

namespace mk {

// The results that were saved, and their gradients: read [T, V], lse and lse_rest [T]. A missing d_read is zero.
class SavedRead {
 public:
  SavedRead(Arguments& args, const Tensor& query, int64_t T, int64_t V, const Tensor& read, const Tensor& lse,
            const Tensor& lse_rest, const std::optional<Tensor>& d_read, const std::optional<Tensor>& d_lse)
      : zeros_(d_read.has_value() ? *d_read : zeros_like(read)),
        read_(&args.add("read", read, Side::tokens, {T, V})),
        d_read_(&args.add("d_read", zeros_, Side::tokens, {T, V})),
        lse_(&args.add("lse", lse, Side::tokens, {T})),
        lse_rest_(&args.add("lse_rest", lse_rest, Side::tokens, {T})),
        d_lse_(args.add("d_lse", d_lse, Side::tokens, {T})) {
    args.floats({&query, read_, d_read_, lse_, lse_rest_, d_lse_});
    args.stats({lse_, lse_rest_, d_lse_}, query);
  }
  // After the last argument.
  template <class Backward>
  void fill(Arguments& args, Backward& p) const {
    p.forward.read = args.view(read_, 2);
    p.forward.lse = args.view(lse_, 1), p.forward.lse_rest = args.view(lse_rest_, 1);
    p.d_read = args.view(d_read_, 2), p.d_lse = args.view(d_lse_, 1);
  }

 private:
  Tensor zeros_;
  const Tensor *read_, *d_read_, *lse_, *lse_rest_, *d_lse_;
};

}  // namespace mk
