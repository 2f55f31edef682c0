#pragma once

#include "params/topk_search.h"

namespace mk {

// The k largest sums of one score from each of two lists of n half keys, best first. Equal sums are ordered by slot
// number i * n + j. If there are fewer than k, the rest has index -1 and score -inf.
struct ProductKeySearch {
  // The search of the two lists: N = n, k at most n. The last leading dimension, of size 2, is the half. Its results
  // are not used.
  TopkSearch halves;
  int64_t k;
  View scores, indices;  // [T, k], stride 0 in the dimension of the half
};

// Gradients: those of a search of the lists. halves.choice.indices are the slots i * n + j, already checked. They and
// halves.d_scores have stride 0 in the dimension of the half.
struct ProductKeySearchBackward {
  TopkSearchBackward halves;
};

}  // namespace mk

MK_DECLARE(void, product_key_search, ProductKeySearch)
MK_DECLARE(void, product_key_search_backward, ProductKeySearchBackward)
