#pragma once

#include "params/choice.h"

namespace mk {

// The k largest s[t, i] = scale <query_t, key_i> + mask_i of every token, best first, equal scores by smaller index. If
// there are fewer than k, the rest has index -1 and score -inf. Of the slots range[t, 0] <= i < range[t, 1] alone where
// ranges are given.
struct TopkSearch {
  Lead lead;
  int64_t T, N, K, k;
  View query;
  SlotView keys;
  View mask, range;
  View scores, indices;
  double scale;
};

// Gradients. choice.indices are the slots found by the search, already checked. A missing d_<argument> is not wanted.
struct TopkSearchBackward {
  Choice choice;
  int64_t K;
  View query;
  SlotView keys;
  View d_scores;
  View d_query;
  MemoryGradient d_keys, d_mask;
  double scale;
};

}  // namespace mk

MK_DECLARE(void, topk_search, TopkSearch)
MK_DECLARE(void, topk_search_backward, TopkSearchBackward)
