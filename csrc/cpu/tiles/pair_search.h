// Search among all pairs of two lists of n half keys, and its gradient (cpu/tiles/pair_search.cpp).
//
// The half is the last leading dimension, of size 2. Tokens, indices and everything else that belongs to a pair lack it
// and are batched over the leading dimensions before it. Slot i n + j is the pair of rows i and j.
#pragma once

#include "cpu/tiles/search.h"
#include "cpu/tiles/search_gradient.h"

namespace mk::MK_ISA {

// The leading dimensions before the half. A view with stride 0 in the half serves both halves.
inline Lead without_half(Lead lead) {
  --lead.rank;
  return lead;
}

// Passes the best k pairs of every token, best first, to `finish` (see cpu/tiles/search.h). halves: the search of the
// lists, with min(n, k) as its k.
void search_pairs(const TopkSearch& halves, int64_t k, size_t finish_bytes, Finish<float> finish);
void search_pairs(const TopkSearch& halves, int64_t k, size_t finish_bytes, Finish<double> finish);

// Gradients of query and half keys. halves: as for a search of the lists, but its choice holds pairs, and choice.N = n.
// score_gradient: as in cpu/tiles/search_gradient.h, called once per half.
void pair_gradient(const TopkSearchBackward& halves, ScoreGradient<float> score_gradient);
void pair_gradient(const TopkSearchBackward& halves, ScoreGradient<double> score_gradient);

}  // namespace mk::MK_ISA
