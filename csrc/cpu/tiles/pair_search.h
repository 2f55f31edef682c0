// Search among all pairs of two lists of n half keys, and its gradient (cpu/tiles/pair_search.cpp).
//
// The half is the last leading dimension, of size 2. Tokens, indices and everything that belongs to a pair lack it:
// they are batched over the leading dimensions before it, and slot i n + j is the pair of rows i and j.
#pragma once

#include "cpu/tiles/search.h"
#include "cpu/tiles/search_gradient.h"

namespace mk::MK_ISA {

// The leading dimensions before the half. Views whose stride is 0 in the half serve both.
inline Lead without_half(Lead lead) {
  --lead.rank;
  return lead;
}

// The best k pairs of every token, best first, as `finish` of cpu/tiles/search.h takes them. halves: the search of the
// lists, whose k is the least of n and this one.
void search_pairs(const TopkSearch& halves, int64_t k, size_t finish_bytes, Finish<float> finish);
void search_pairs(const TopkSearch& halves, int64_t k, size_t finish_bytes, Finish<double> finish);

// Gradients of query and half keys. halves: that of a search of the lists, but its choice holds pairs; choice.N = n.
// score_gradient as in cpu/tiles/search_gradient.h, where it is called once per half.
void pair_gradient(const TopkSearchBackward& halves, ScoreGradient<float> score_gradient);
void pair_gradient(const TopkSearchBackward& halves, ScoreGradient<double> score_gradient);

}  // namespace mk::MK_ISA
