#pragma once

#include "params/topk_read.h"

namespace mk {

// read[t] = sum_j weights[t, j] value_i with i = indices[t, j], where weights are the softmax over j of
// scale <query_t, key_i> + mask_i, 0 where i is -1 or the mask -inf. lse[t] is the logarithm of the sum of the
// exponentials, -inf where there is none. Indices have been checked.
struct SelectedRead {
  Choice choice;
  int64_t K, V;
  View query;
  SlotView keys, values;
  View mask;
  View read, weights, lse;
  double scale;
};

// Gradients, those of topk_read for the slots that were named and may be addressed.
struct SelectedReadBackward {
  TopkReadBackward read;
  View mask;
};

}  // namespace mk

MK_DECLARE(void, selected_read, SelectedRead)
MK_DECLARE(void, selected_read_backward, SelectedReadBackward)
