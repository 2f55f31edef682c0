#pragma once

#include "params/isa.h"
#include "params/view.h"

namespace mk {

// read[t] = sum_i softmax_i(s[t, i]) value_i, and lse[t] with its rounding error, where
// s[t, i] = scale <query_t, key_i> + mask_i, over the slots range[t, 0] <= i < range[t, 1] where ranges are given.
struct SoftmaxRead {
  Lead lead;
  int64_t T, N, K, V;
  View query;
  SlotView keys, values;
  View mask, range;
  View read, lse, lse_rest;
  double scale;
};

// Gradients, float (double for double). d_read and d_lse may be missing; a missing d_<argument> is not wanted. d_keys,
// d_values and d_mask are summed over leading dimensions in which their stride is 0.
struct SoftmaxReadBackward {
  SoftmaxRead forward;
  View d_read, d_lse;
  View d_query, d_keys, d_values, d_mask;
};

}  // namespace mk

MK_DECLARE(void, softmax_read, SoftmaxRead)
MK_DECLARE(void, softmax_read_backward, SoftmaxReadBackward)
