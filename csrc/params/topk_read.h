#pragma once

#include "params/topk_search.h"

namespace mk {

// read[t] = sum_j weights[t, j] values[indices[t, j]], weights = softmax over the k scores of a search, lse[t] the
// logarithm of the sum of their exponentials, -inf where there are none.
struct TopkRead {
  TopkSearch search;  // its scores are not used
  int64_t V;
  SlotView values;
  View read, weights, lse;
};

// Gradients. A missing d_read, d_weights or d_lse is zero.
struct TopkReadBackward {
  TopkSearchBackward search;  // its d_scores are not used
  int64_t V;
  SlotView values;
  View weights;
  View d_read, d_weights, d_lse;
  MemoryGradient d_values;
};

}  // namespace mk

MK_DECLARE(void, topk_read, TopkRead)
MK_DECLARE(void, topk_read_backward, TopkReadBackward)
