// Scores that are summed over heads: s[t, i] = sum_h w[t, h] relu(x[t, h, i]) + mask_i,  x[t, h, i] = scale <q_th, k_i>.
#pragma once

#include "cuda/tiles/search_lists.h"
#include "params/indexer_search.h"

namespace mk::cuda {

// NaN where x is NaN.
MK_DEVICE float relu(float x) { return x <= 0 ? 0.f : x; }

// Do the queries of every head consist of whole packs?
inline bool in_packs(const View& query, const Heads& heads, const Lead& lead, int64_t K) {
  return in_packs(query, lead, K) && heads.stride % 16 == 0;
}

// Searches in tiles on the tensor cores. Returns lists without keys if no layout fits the shared memory of a block.
// (indexer_search_tiles.cu)
Lists search_heads_in_tiles(const Device& device, const char* name, const IndexerSearch& p);

}  // namespace mk::cuda
