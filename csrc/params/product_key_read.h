#pragma once

#include "params/product_key_search.h"

namespace mk {

// read[t] = sum_j weights[t, j] values[indices[t, j]], weights = softmax over the k scores of a search of pairs. Of
// `values`, reads and weights the leading dimension of the half has stride 0.
struct ProductKeyRead {
  ProductKeySearch search;  // without scores
  int64_t V;
  View values;
  View read, weights;
};

// Its gradients. A missing d_read or d_weights is zero.
struct ProductKeyReadBackward {
  ProductKeySearchBackward search;  // without d_scores
  int64_t V;
  View values;
  View weights;
  View d_read, d_weights;
  MemoryGradient d_values;
};

}  // namespace mk

MK_DECLARE(void, product_key_read, ProductKeyRead)
MK_DECLARE(void, product_key_read_backward, ProductKeyReadBackward)
