// What the ops on chosen slots share: rows are gathered, multiplied, and summed back.
#pragma once

#include "cpu/choice.h"
#include "cuda/device.h"

namespace mk::cuda {

// out[t] = factor * sum_j weights[t, j] rows[index[t, j]]; a row is `width` numbers. (sparse_read.cu)
struct Gather {
  Choice choice;
  int64_t width;
  View rows, weights, out;
  float factor;
};
void gather_chosen(const Device& device, const char* name, const Gather& g);

// out[t, j] = <tokens[t], rows[index[t, j]]>, 0 where there is no slot. (sparse_read.cu)
struct Products {
  Choice choice;
  int64_t width;
  View rows, tokens, out;
};
void multiply_chosen(const Device& device, const char* name, const Products& p);

// out[i] = factor * sum over entries (t, j) with index[t, j] = i, in the order of the tokens, of weights[t, j] tokens[t]. Writes
// all of `out`, if it is wanted. (segments.cu)
struct ChosenSum {
  Choice choice;
  int64_t width;
  MemoryGradient out;
  View tokens;   // null: the weights alone are summed, width 1
  View weights;  // [lead, T, k]
  float factor;
};
void sum_chosen(const Device& device, const char* name, const ChosenSum& s);

}  // namespace mk::cuda
