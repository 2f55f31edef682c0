// The parts of the search, and what it shares with topk_read: few tokens by streams (topk_search.cu), many by tiles on the tensor
// cores (topk_search_tiles.cu).
#pragma once

#include "cuda/tiles/best.h"
#include "cuda/tiles/device.h"
#include "params/topk_search.h"

namespace mk::cuda {

// Where ranges of slots meet: the sorted list of every token in each.
struct Lists {
  int length = 0;                // a power of two, at least 32 and k
  int64_t splits = 0, rows = 0;  // ranges; tokens of all batches
  Key* keys = nullptr;           // [splits][rows][length]
};

// Whether the tiles take the dtypes and sizes of this call, on this device, and the lists that they make.
bool tiles_take(const Device&, const TopkSearch&, int list);
Lists search_in_tiles(const Device&, const char* name, const TopkSearch&, int list);

// The search; its result is written as scores, or (where p.scores is missing) as softmax weights into `weights`.
void search(const Device& device, const char* name, const TopkSearch& p, const View& weights);

// Contiguous numbers [lead, T, k] in scratch memory.
View dense(const Device& device, const Choice& c);

// The gradients of query, keys and mask from those of the chosen scores, `ds` [lead, T, k], 0 where there is no slot.
void search_gradients(const Device& device, const char* name, const TopkSearchBackward& p, const View& ds);

}  // namespace mk::cuda
