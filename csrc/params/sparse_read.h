#pragma once

#include "params/choice.h"

namespace mk {

// read[t] = sum_j weights[t, j] values[indices[t, j]]
struct SparseRead {
  Choice choice;
  int64_t V;
  SlotView values;
  View weights;
  View read;
};

// Gradients. A missing d_<argument> is not wanted.
struct SparseReadBackward {
  SparseRead forward;  // without its result
  View d_read;
  MemoryGradient d_values;
  View d_weights;
};

}  // namespace mk

// Returns an index outside [-1, N), or -1 if there is none; no row of such a number is read.
MK_DECLARE(int64_t, sparse_read, SparseRead)
// Its indices have been checked.
MK_DECLARE(void, sparse_read_backward, SparseReadBackward)
