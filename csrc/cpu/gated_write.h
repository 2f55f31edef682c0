#pragma once

#include "common/isa.h"
#include "common/view.h"

namespace mk {

// v_i <- v_i (1 - a[t, i] e_t) + a[t, i] w_t for t = 1 .. T in order, a = sigmoid(scale <query_t, key_i> + mask_i), where
// token_mask[t]. retained_i = prod_t (1 - a[t, i]). `out` may be `values` itself.
struct GatedWrite {
  Lead lead;
  int64_t T, N, K, V;
  View values, keys, query, write, erase, mask, token_mask;
  View out, retained;
  double scale, erase_scale;  // e_t = erase_scale where `erase` is missing
};

// Gradients, float (double for double); a missing one is not wanted. d_keys, d_values and d_mask are summed over leading
// dimensions in which their stride is 0. d_retained may be missing.
struct GatedWriteBackward {
  GatedWrite forward;
  View d_out, d_retained;
  View d_values, d_keys, d_query, d_write, d_erase, d_mask;
};

}  // namespace mk

// The closed form, for a number as erase, and the scan, for a vector.
MK_DECLARE(void gated_write(const GatedWrite&))
MK_DECLARE(void gated_write_backward(const GatedWriteBackward&))
MK_DECLARE(void gated_write_scan(const GatedWrite&))
MK_DECLARE(void gated_write_scan_backward(const GatedWriteBackward&))
