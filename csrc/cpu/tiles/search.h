// Exact search: the k largest scores of every token and their slots (cpu/tiles/search.cpp).
#pragma once

#include "cpu/tiles/parallel.h"
#include "params/indexer_search.h"
#include "params/paged_topk_search.h"

namespace mk::MK_ISA {

// Receives the n best slots of a token, best first: finish(batch, token, scores, slots, n, arena). The arena has room
// for `finish_bytes`. Runs in parallel.
template <class F>
using Finish = FunctionRef<void(int64_t, int64_t, const F*, const int64_t*, int64_t, Arena)>;

// With `frames`, slots are numbered by their pages, frames without a page are not read, and the best slots of an
// earlier search take part. With `heads`, scores are sums over heads (cpu/tiles/head_scores.h).
void search(const TopkSearch& p, size_t finish_bytes, Finish<float> finish, const Frames* frames = nullptr,
            const Heads* heads = nullptr);
void search(const TopkSearch& p, size_t finish_bytes, Finish<double> finish, const Frames* frames = nullptr,
            const Heads* heads = nullptr);

}  // namespace mk::MK_ISA
