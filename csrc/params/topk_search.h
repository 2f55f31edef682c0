#pragma once

#include "params/choice.h"

namespace mk {

// The k largest s[t, i] = scale <query_t, key_i> + mask_i of every token, best first, equal scores by smaller index;
// index -1 and score -inf behind the last.
struct TopkSearch {
  Lead lead;
  int64_t T, N, K, k;
  View query;
  SlotView keys;
  View mask;
  View scores, indices;
  double scale;
};

// Its gradients. choice.indices are the slots that were found and have been checked. A missing d_<argument> is not
// wanted.
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
