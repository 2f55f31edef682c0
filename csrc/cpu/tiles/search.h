// Exact search: the k largest scores of every token and their slots (cpu/tiles/search.cpp).
#pragma once

#include "cpu/tiles/parallel.h"
#include "params/topk_search.h"

namespace mk::MK_ISA {

// Takes the best n of a token, best first: finish(batch, token, scores, slots, n, arena), with room in the arena for the bytes that
// were asked for. Runs in parallel.
template <class F>
using Finish = FunctionRef<void(int64_t, int64_t, const F*, const int64_t*, int64_t, Arena)>;

void search(const TopkSearch& p, size_t finish_bytes, Finish<float> finish);
void search(const TopkSearch& p, size_t finish_bytes, Finish<double> finish);

}  // namespace mk::MK_ISA
