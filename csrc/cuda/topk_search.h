// What the search shares with topk_read.
#pragma once

#include "cuda/launchers.h"

namespace mk::cuda {

// The search; its result is written as scores, or (where p.scores is missing) as softmax weights into `weights`.
void search(const Device& device, const char* name, const TopkSearch& p, const View& weights);

// Contiguous numbers [lead, T, k] in scratch memory.
View dense(const Device& device, const Choice& c);

// The gradients of query, keys and mask from those of the chosen scores, `ds` [lead, T, k], 0 where there is no slot.
void search_gradients(const Device& device, const char* name, const TopkSearchBackward& p, const View& ds);

}  // namespace mk::cuda
