#pragma once

#include "params/topk_search.h"

namespace mk {

// H queries per token, `stride` bytes from one to the next, and their weights [T, H].
struct Heads {
  int64_t H = 0, stride = 0;
  View weights;
};

// The k largest s[t, i] = sum_h weights[t, h] relu(scale <query_th, key_i>) + mask_i of every token, in the order and
// with the ranges of topk_search.
struct IndexerSearch {
  TopkSearch search;
  Heads heads;
};

// Gradients. `d_stride`: bytes from head to head of d_query. A missing d_<argument> is not wanted.
struct IndexerSearchBackward {
  TopkSearchBackward search;
  Heads heads;
  int64_t d_stride;
  View d_weights;
};

}  // namespace mk

MK_DECLARE(void, indexer_search, IndexerSearch)
MK_DECLARE(void, indexer_search_backward, IndexerSearchBackward)
