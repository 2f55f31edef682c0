// Gradients of the scores of chosen slots, ds[t, j] of s = scale <q_t, k_{i[t, j]}> + mask_{i[t, j]}:
//   dq_t = scale sum_j ds[t, j] k_{i[t, j]}
//   dk_i = scale sum_{i[t, j] = i} ds[t, j] q_t,   dmask_i = sum_{i[t, j] = i} ds[t, j]
#pragma once

#include "cpu/tiles/segments.h"
#include "params/topk_search.h"

namespace mk::MK_ISA {

// score_gradient(batch, token, ds, arena) writes ds[0..k), 0 where the index is -1. `extra` is summed beside the gradients here.
template <class F>
using ScoreGradient = FunctionRef<void(int64_t, int64_t, F*, Arena)>;

void search_gradient(const TopkSearchBackward& p, float* ds, const Sum<float>& extra, size_t bytes,
                     ScoreGradient<float> score_gradient);
void search_gradient(const TopkSearchBackward& p, double* ds, const Sum<double>& extra, size_t bytes,
                     ScoreGradient<double> score_gradient);

}  // namespace mk::MK_ISA
