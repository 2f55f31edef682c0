// Gradients of memory from the tokens that chose it:  out[i] = factor * sum over (t, j) with index[t, j] = i of
// weight[t, j] row_t, in the order of the tokens (cpu/tiles/segments.cpp).
#pragma once

#include "cpu/tiles/gather.h"
#include "cpu/tiles/parallel.h"
#include "cpu/tiles/scores.h"
#include "params/choice.h"

namespace mk::MK_ISA {

// What is summed into one gradient.
template <class F>
struct Sum {
  MemoryGradient out;
  int64_t width;
  const F* weights;  // one per entry, [all tokens][k]
  F factor;
  const char* const* rows;  // one per token, of `dtype`; null: the weights alone are summed (width 1)
  DType dtype;
};

// Where the rows of all tokens lie.
class TokenPointers {
 public:
  TokenPointers(const View& v, const Lead& lead, int64_t T) : rows_(v ? lead.batches() * lead.folded() * T : 0) {
    const int64_t tokens = lead.folded() * T;
    for (int64_t b = 0; v && b < lead.batches(); ++b) {
      const TokenRows rows(v, lead, b, T);
      for (int64_t t = 0; t < tokens; ++t) rows_.data()[b * tokens + t] = rows.row(t);
    }
  }
  const char* const* data() { return rows_.data(); }

 private:
  Buffer<const char*> rows_;
};

// All sums whose gradient is wanted, at most 8. Indices have been checked.
void sum_chosen(const Choice& c, const Sum<float>* sums, int count);
void sum_chosen(const Choice& c, const Sum<double>* sums, int count);

}  // namespace mk::MK_ISA
