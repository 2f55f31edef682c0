#pragma once

#include "params/isa.h"
#include "params/view.h"

namespace mk {

// Where the gates a[t, i] of a write come from: from scores, each for itself or over all slots, or they are given.
enum class Gate : int8_t { sigmoid, softmax, given };

// What makes the scores of one token a softmax: a_i = exp(s_i - top) * inverse. `slot` is the one with the
// largest score, and `left` its 1 - a, a sum and not a difference.
template <class F>
struct SoftmaxRow {
  F top, inverse, left;
  int64_t slot;
};

// v_i <- v_i (1 - a[t, i] e_t) + a[t, i] w_t for t = 1 .. T in order, where token_mask[t]. Of the scores
// scale <query_t, key_i> + mask_i, a is a sigmoid or a softmax over i. retained_i = prod_t (1 - a[t, i]). `out` may be `values`
// itself.
struct GatedWrite {
  Lead lead;
  int64_t T, N, K, V;
  View values, keys, query, write, erase, mask, token_mask;
  View out, retained;
  double scale, erase_scale;  // e_t = erase_scale where `erase` is missing
  Gate gate = Gate::sigmoid;
  View weights = {};  // [T, N], the gates that are given; then K = 0, `keys` are any rows, query and mask are missing

  DType lead_dtype() const { return gate == Gate::given ? weights.dtype : query.dtype; }
};

// Gradients, float (double for double); a missing one is not wanted. d_keys, d_values and d_mask are summed over leading
// dimensions in which their stride is 0. d_retained may be missing. d_weights are those of gates that are given, in any dtype.
struct GatedWriteBackward {
  GatedWrite forward;
  View d_out, d_retained;
  View d_values, d_keys, d_query, d_write, d_erase, d_mask;
  View d_weights = {};
};

}  // namespace mk

// The closed form, for a number as erase, and the scan, for a vector.
MK_DECLARE(void, gated_write, GatedWrite)
MK_DECLARE(void, gated_write_backward, GatedWriteBackward)
MK_DECLARE(void, gated_write_scan, GatedWrite)
MK_DECLARE(void, gated_write_scan_backward, GatedWriteBackward)
