#pragma once

#include "params/topk_search.h"

namespace mk {

// The k largest sums of one score of each of two lists of n half keys, best first, equal sums by smaller slot number i
// * n + j; index -1 and score -inf behind the last.
struct ProductKeySearch {
  // The search of the lists: N = n, k at most n, and the last leading dimension, of size 2, is the half. Its results
  // are not used.
  TopkSearch halves;
  int64_t k;
  View scores, indices;  // [T, k], stride 0 in the dimension of the half
};

// Its gradients: those of a search of the lists. halves.choice.indices are the slots i * n + j, checked, stride 0 in
// the dimension of the half; so is halves.d_scores.
struct ProductKeySearchBackward {
  TopkSearchBackward halves;
};

}  // namespace mk

MK_DECLARE(void, product_key_search, ProductKeySearch)
MK_DECLARE(void, product_key_search_backward, ProductKeySearchBackward)
