#pragma once

#include "params/topk_search.h"

namespace mk {

// read[t] = sum_j weights[t, j] values[indices[t, j]], weights = softmax over the k scores of a search.
struct TopkRead {
  TopkSearch search;  // without scores
  int64_t V;
  SlotView values;
  View read, weights;
};

// Its gradients. A missing d_read or d_weights is zero.
struct TopkReadBackward {
  TopkSearchBackward search;  // without d_scores
  int64_t V;
  SlotView values;
  View weights;
  View d_read, d_weights;
  MemoryGradient d_values;
};

}  // namespace mk

MK_DECLARE(void, topk_read, TopkRead)
MK_DECLARE(void, topk_read_backward, TopkReadBackward)
