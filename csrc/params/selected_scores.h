#pragma once

#include "params/choice.h"

namespace mk {

// scores[t, j] = scale <query_t, key_i> with i = indices[t, j], -inf where that is -1. Indices have been checked. The
// gradient is that of topk_search.
struct SelectedScores {
  Choice choice;
  int64_t K;
  View query;
  SlotView keys;
  View scores;
  double scale;
};

}  // namespace mk

MK_DECLARE(void, selected_scores, SelectedScores)
