// Sums over all pairs of tokens and slots, and the weights of the pairs themselves, for the ops that need all pairs. From ds (Rule
// says how):
//   dq_t = scale sum_i ds[t, i] k_i,   dlse_t = -sum_i ds[t, i]
//   dk_i = scale sum_t ds[t, i] q_t,   dv_i = sum_t w[t, i] dr_t,   dmask_i = sum_t ds[t, i]
// and usage_i = sum_t w[t, i].
#pragma once

#include "cuda/tiles/device.h"
#include "cuda/tiles/pair_tiles.h"

namespace mk::cuda {

// What is wanted of the sums.
struct PairSums {
  View d_query, d_lse;            // by tokens
  View d_keys, d_values, d_mask;  // by slots
  View usage;                     // instead of d_mask
};

// terms[t] = d_lse_t - <a_t, b_t>, in scratch memory. A missing row counts as zero.
const float* terms_of(const Device& device, const char* name, const Pairs& p, const View& a, const View& b,
                      const View& d_lse, int64_t width);
void sum_pairs(const Device& device, const char* name, const Pairs& p, const PairSums& out);
// The sums over tokens alone.
void sum_pairs_by_slots(const Device& device, const char* name, const Pairs& p, const PairSums& out);
// weights[t, i] = w[t, i]
void weigh_pairs(const Device& device, const char* name, const Pairs& p, const View& weights);

}  // namespace mk::cuda
