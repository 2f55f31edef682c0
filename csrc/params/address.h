#pragma once

#include "params/isa.h"
#include "params/view.h"

namespace mk {

// weights[t, i] = gate(scale <query_t, key_i> + mask_i); gate: softmax over i, or sigmoid.
struct Address {
  Lead lead;
  int64_t T, N, K;
  View query, keys, mask;
  View lse, lse_rest;  // of the scores, for softmax
  View weights;
  double scale;
  bool sigmoid;
};

// A missing d_<argument> is not wanted; all are float (double for double), as in softmax_read.
struct AddressBackward {
  Address forward;
  View d_weights;
  View d_query, d_keys, d_mask;
};

}  // namespace mk

MK_DECLARE(void, address, Address)
MK_DECLARE(void, address_backward, AddressBackward)
