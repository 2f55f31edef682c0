// The parts of the search, also used by topk_read: few tokens by streams (topk_search.cu), many by tiles on the tensor
// cores (topk_search_tiles.cu).
#pragma once

#include "cuda/tiles/best.h"
#include "cuda/tiles/device.h"
#include "params/topk_read.h"

namespace mk::cuda {

// The partial results of ranges of slots: a sorted list for every token in each.
struct Lists {
  int length = 0;                // a power of two, at least 32 and k
  int64_t splits = 0, rows = 0;  // ranges; tokens of all batches
  Key* keys = nullptr;           // [splits][rows][length]
};

// The length of the lists of a call. Raises an error if no CUDA kernel can run it.
int list_length(const char* name, const TopkSearch&);

// Merges the lists of every token. Writes indices and scores; or, if p.scores is missing, softmax weights into
// `weights`, and the logarithm of the sum of their exponentials into `lse`.
void finish(const Device&, const char* name, const TopkSearch& p, const View& weights, const View& lse, const Lists&);

// Do the tiles support the dtypes and sizes of this call on this device, with lists of this length?
bool tiles_take(const Device&, const TopkSearch&, int list);
Lists search_in_tiles(const Device&, const char* name, const TopkSearch&, int list);

// The whole search.
void search(const Device& device, const char* name, const TopkSearch& p, const View& weights = {},
            const View& lse = {});

// A contiguous view [lead, T, k] in scratch memory.
View dense(const Device& device, const Choice& c, DType dtype = DType::f32);

// The gradients of chosen scores in scratch memory, [lead, T, k], 0 where there is no slot.
View chosen_gradients(const Device& device, const char* name, const Choice& c, const View& d_scores);

// The gradients of query, keys and mask from `ds`, those of the chosen scores, [lead, T, k], 0 where there is no slot.
void search_gradients(const Device& device, const char* name, const TopkSearchBackward& p, const View& ds);

// The gradients of a softmax read of chosen slots. (topk_read.cu)
void read_gradients(const Device& device, const char* name, const TopkReadBackward& b);

}  // namespace mk::cuda
