#pragma once

#include "params/topk_search.h"

namespace mk {

// Where the slots of a search lie: frame f holds slots S * pages[f] .. S * pages[f] + S - 1, or none if pages[f] < 0.
// And what an earlier search over other pages found, best_scores and best_slots [T, k], slot -1 for none; both may be
// missing.
struct Frames {
  int64_t F, S;
  View pages;
  View best_scores, best_slots;
};

// TopkSearch over N = F * S slots in frames; indices are slot numbers, scores are in the dtype of sums.
struct PagedTopkSearch {
  TopkSearch search;
  Frames frames;
};

// Gradients. search.choice.indices are positions f * S + j of the slots found, -1 for those of another call. A missing
// d_best is not wanted; frames.best_slots is there if it is wanted.
struct PagedTopkSearchBackward {
  TopkSearchBackward search;
  Frames frames;
  View slots;   // int64 [T, k]: the numbers of the slots found
  View d_best;  // [T, k]
};

}  // namespace mk

MK_DECLARE(void, paged_topk_search, PagedTopkSearch)
MK_DECLARE(void, paged_topk_search_backward, PagedTopkSearchBackward)
