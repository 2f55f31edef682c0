#pragma once

#include "params/choice.h"

namespace mk {

// read[t] = sum_j weights[t, j] values[indices[t, j]]; indices have been checked.
struct SparseRead {
  Choice choice;
  int64_t V;
  SlotView values;
  View weights;
  View read;
};

// Its gradients. A missing d_<argument> is not wanted.
struct SparseReadBackward {
  SparseRead forward;  // without its result
  View d_read;
  MemoryGradient d_values;
  View d_weights;
};

}  // namespace mk

MK_DECLARE(void, sparse_read, SparseRead)
MK_DECLARE(void, sparse_read_backward, SparseReadBackward)
