// Gradients of memory from the tokens that chose it, in a fixed order: see segments.cu.
#pragma once

#include "cpu/choice.h"
#include "cuda/device.h"

namespace mk::cuda {

// out[i] = factor * sum over entries (t, j) with index[t, j] = i, in the order of the tokens, of weight[t, j] row_t.
struct ChosenSum {
  MemoryGradient out;
  int64_t width;
  View rows;             // of the tokens; null: the weights alone are summed (width 1)
  View weights;          // [lead, T, k]; null: `flat`
  const float* flat;     // one per entry, [all tokens][k]
  float factor;
};

// Writes all of out. Nothing where out is not wanted.
void sum_chosen(const Device& device, const char* name, const Choice& choice, const ChosenSum& sum);

}  // namespace mk::cuda
