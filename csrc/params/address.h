#pragma once

#include "params/isa.h"
#include "params/view.h"

namespace mk {

// weights[t, i] = gate(scale <query_t, key_i> + mask_i); gate: softmax over i, or sigmoid. 0 but
// for range[t, 0] <= i < range[t, 1] where ranges are given.
struct Address {
  Lead lead;
  int64_t T, N, K;
  View query, keys, mask, range;
  View lse, lse_rest;  // of the scores, for the softmax gate of a GPU; the CPU takes both from the scores
  View weights;
  double scale;
  bool sigmoid;
};

// Gradients, float (double for double), as in softmax_read. A missing d_<argument> is not wanted.
struct AddressBackward {
  Address forward;
  View d_weights;
  View d_query, d_keys, d_mask;
};

}  // namespace mk

MK_DECLARE(void, address, Address)
MK_DECLARE(void, address_backward, AddressBackward)
