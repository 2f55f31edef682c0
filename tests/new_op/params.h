#pragma once

#include "params/isa.h"
#include "params/view.h"

namespace mk {

// r_t = gain * sum_i decay_i <query_t, key_i> v_i
struct DecayRead {
  Lead lead;
  int64_t T, N, K, V;
  View query, keys, values, decay;
  View read;
  double gain;
};

// Gradients, float (double for double); a missing one is not wanted. Those of the memory begin at 0.
struct DecayReadBackward {
  DecayRead forward;
  View d_read;
  View d_query, d_keys, d_values, d_decay;
};

}  // namespace mk

MK_DECLARE(void, decay_read, DecayRead)
MK_DECLARE(void, decay_read_backward, DecayReadBackward)
