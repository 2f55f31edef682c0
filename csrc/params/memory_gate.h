#pragma once

#include "params/isa.h"
#include "params/view.h"

namespace mk {

// score = <hidden * w_h, key * w_k> * rstd_h * rstd_k / sqrt(D) of every branch of every token, and
// gated = sigmoid(signed square root of score, or score) * value. All leading dimensions are folded into the tokens.
struct MemoryGate {
  Lead lead;
  int64_t B, D;
  View hidden, key;                // rows [B]
  View value;                      // one row per token
  View hidden_weight, key_weight;  // [B, D]
  double eps;
  bool signed_sqrt;
  View gated;                         // rows [B]
  View hidden_rstd, key_rstd, score;  // [B] float, double for double
};

// Gradients; those that are missing are not wanted.
struct MemoryGateBackward {
  MemoryGate forward;  // without `gated`
  View d_gated;
  View d_hidden, d_key, d_value;
  View d_hidden_weight, d_key_weight;  // [B, D] float, double for double
};

}  // namespace mk

MK_DECLARE(void, memory_gate, MemoryGate)
MK_DECLARE(void, memory_gate_backward, MemoryGateBackward)
