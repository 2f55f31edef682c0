#pragma once

#include "params/isa.h"
#include "params/view.h"

namespace mk {

// usage_i = sum_t exp(scale <query_t, key_i> + mask_i - lse_t), float (double for double). Over
// the tokens with range[t, 0] <= i < range[t, 1] where ranges are given.
struct SlotUsage {
  Lead lead;
  int64_t T, N, K;
  View query, keys, mask, range, lse;
  View usage;
  double scale;
};

// Gradients, float (double for double), as in softmax_read. A missing d_<argument> is not wanted.
struct SlotUsageBackward {
  SlotUsage forward;
  View d_usage;
  View d_query, d_keys, d_lse, d_mask;
};

}  // namespace mk

MK_DECLARE(void, slot_usage, SlotUsage)
MK_DECLARE(void, slot_usage_backward, SlotUsageBackward)
