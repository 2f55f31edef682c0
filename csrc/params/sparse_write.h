#pragma once

#include "params/choice.h"

namespace mk {

// v_i <- v_i (1 - a e_t) + a w_t with a = weights[t, j] for i = indices[t, j], entries (t, j) in order, -1 left out. `out` may be
// `values` itself, then other rows are not touched. Indices have been checked.
struct SparseWrite {
  Choice choice;
  int64_t V;
  View values, weights, write, erase;
  View out;
  double erase_scale;  // e_t = erase_scale where `erase` is missing
};

// Its gradients; a missing one is not wanted. d_values has the dtype of the values, d_weights any, d_write and d_erase are float
// (double for double).
struct SparseWriteBackward {
  SparseWrite forward;
  View d_out;
  View d_values, d_weights, d_write, d_erase;
};

}  // namespace mk

MK_DECLARE(void, sparse_write, SparseWrite)
MK_DECLARE(void, sparse_write_backward, SparseWriteBackward)
