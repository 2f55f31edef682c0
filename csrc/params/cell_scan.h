#pragma once

#include "params/isa.h"
#include "params/view.h"

namespace mk {

// [zf, zi, zc] = x_t + W h_{t-1},  h_t = sigmoid(zf) h_{t-1} + sigmoid(zi) tanh(zc) for t = 1 .. T; h_0 is `initial`, or 0 where it
// is missing. The weight is the memory: a batch is one weight, and what is folded are the streams that it serves.
struct CellScan {
  Lead lead;
  int64_t T, D;
  View inputs, weight, initial, states;  // [T, 3D], [3D, D], [D], [T, D]
};

// Gradients, float (double for double); a missing one is not wanted.
struct CellScanBackward {
  CellScan forward;
  View d_states;
  View d_inputs, d_weight, d_initial;
};

}  // namespace mk

MK_DECLARE(void, cell_scan, CellScan)
MK_DECLARE(void, cell_scan_backward, CellScanBackward)
