#pragma once

#include "params/isa.h"
#include "params/view.h"

namespace mk {

// h_t = f_t * h_{t-1} + u_t for t = 1 .. T, channel by channel; h_0 is `initial`, or 0 where it is missing. No tensor belongs to
// a memory: every leading dimension is folded, and a fold is a stream.
struct GatedScan {
  Lead lead;
  int64_t T, D;
  View forget, update, initial, states;
};

// Gradients, float (double for double); a missing one is not wanted.
struct GatedScanBackward {
  GatedScan forward;
  View d_states;
  View d_forget, d_update, d_initial;
};

}  // namespace mk

MK_DECLARE(void, gated_scan, GatedScan)
MK_DECLARE(void, gated_scan_backward, GatedScanBackward)
