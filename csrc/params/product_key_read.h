#pragma once

#include "params/product_key_search.h"

namespace mk {

// read[t] = sum_j weights[t, j] values[indices[t, j]], weights = softmax over the k scores of a search of pairs, lse[t]
// the logarithm of the sum of their exponentials. `values`, reads, weights and lse have stride 0 in the dimension of
// the half.
struct ProductKeyRead {
  ProductKeySearch search;  // its scores are not used
  int64_t V;
  SlotView values;
  View read, weights, lse;
};

// Gradients. A missing d_read, d_weights or d_lse is zero.
struct ProductKeyReadBackward {
  ProductKeySearchBackward search;  // its d_scores are not used
  int64_t V;
  SlotView values;
  View weights;
  View d_read, d_weights, d_lse;
  MemoryGradient d_values;
};

}  // namespace mk

MK_DECLARE(void, product_key_read, ProductKeyRead)
MK_DECLARE(void, product_key_read_backward, ProductKeyReadBackward)
