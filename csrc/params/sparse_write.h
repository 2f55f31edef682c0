#pragma once

#include "params/choice.h"

namespace mk {

// v_i <- v_i (1 - a e_t) + a w_t with a = weights[t, j] for i = indices[t, j], entries (t, j) in order, index -1 and
// tokens whose token_mask is not set ignored. `out` may be `values` itself; then the other rows are not touched.
// Indices have been checked.
struct SparseWrite {
  Choice choice;
  int64_t V;
  View values, weights, write, erase, token_mask;
  View out;
  double erase_scale;  // e_t = erase_scale if `erase` is missing
};

// Gradients; a missing one is not wanted. d_values has the dtype of the values, d_weights any dtype, d_write and
// d_erase are float (double for double).
struct SparseWriteBackward {
  SparseWrite forward;
  View d_out;
  View d_values, d_weights, d_write, d_erase;
};

}  // namespace mk

MK_DECLARE(void, sparse_write, SparseWrite)
MK_DECLARE(void, sparse_write_backward, SparseWriteBackward)
