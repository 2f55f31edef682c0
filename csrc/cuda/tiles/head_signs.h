// Scores that are summed over heads:
//   s[t, i] = sum_h w[t, h] relu(x[t, h, i]) + mask_i,  x[t, h, i] = scale <q_th, k_i>
#pragma once

#include "cuda/tiles/chosen_rows.h"
#include "cuda/tiles/numbers.h"
#include "cuda/tiles/search_lists.h"

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

// In tiles on the tensor cores: the gradients of query and head weights, where they are wanted, from `ds`, those of the
// chosen scores, and the signs of all products. Returns false if the tiles do not support the dtypes and sizes.
// (indexer_search_tiles_backward.cu)
bool head_gradients_in_tiles(const Device& device, const char* name, const IndexerSearchBackward& b, const View& ds,
                             const Signs& signs);

}  // namespace mk::cuda
