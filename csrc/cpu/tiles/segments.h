// Gradients of memory from the tokens that chose it, summed in the order of the tokens (cpu/tiles/segments.cpp):
//   out[i] = factor * sum over (t, j) with index[t, j] = i of weight[t, j] row_t
#pragma once

#include "cpu/tiles/gather.h"
#include "cpu/tiles/parallel.h"
#include "cpu/tiles/scores.h"
#include "params/choice.h"

namespace mk::MK_ISA {

// Terms of entries that have several each: `add` lists those of entry t * k + j, at most `most`, with `scratch` numbers
// of memory.
template <class F>
struct Terms {
  int64_t most, scratch;
  FunctionRef<void(int64_t, RowList<F>&, F*)> add;
};

// The terms of one gradient.
template <class F>
struct Sum {
  MemoryGradient out;
  int64_t width;
  const F* weights;  // one per entry, [all tokens][k]
  F factor;
  const char* const* rows;  // one per token, of `dtype`; null: only the weights are summed (width 1)
  DType dtype;
  const Terms<F>* terms = nullptr;  // in place of weights and rows
};

// Pointers to the rows of all tokens.
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

// Computes every gradient that is wanted, at most 8. Indices have been checked.
void sum_chosen(const Choice& c, const Sum<float>* sums, int count);
void sum_chosen(const Choice& c, const Sum<double>* sums, int count);

}  // namespace mk::MK_ISA
