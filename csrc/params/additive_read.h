#pragma once

#include "params/isa.h"
#include "params/view.h"

namespace mk {

// read[t] = sum_i softmax_i(s[t, i]) value_i and lse[t]; s[t, i] = sum_a vector_a tanh(query_ta + key_ia) + mask_i,
// over the slots range[t, 0] <= i < range[t, 1] where ranges are given.
struct AdditiveRead {
  Lead lead;
  int64_t T, N, K, V;
  View query, keys, values, vector, mask, range;
  View read, lse, lse_rest;
};

// Gradients, float (double for double). d_read and d_lse may be missing; a missing d_<argument> is not wanted. Those of
// the memory are summed over leading dimensions in which their stride is 0.
struct AdditiveReadBackward {
  AdditiveRead forward;
  View d_read, d_lse;
  View d_query, d_keys, d_values, d_vector, d_mask;
};

}  // namespace mk

MK_DECLARE(void, additive_read, AdditiveRead)
MK_DECLARE(void, additive_read_backward, AdditiveReadBackward)
