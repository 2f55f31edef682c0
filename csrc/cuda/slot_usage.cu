// slot_usage:  usage_i = sum_t exp(s[t, i] - lse_t)
#include "cuda/tiles/pair_sums.h"
#include "params/slot_usage.h"

namespace mk::cuda {
namespace {

Pairs pairs_of(const SlotUsage& u) {
  Pairs p{};
  p.lead = u.lead, p.T = u.T, p.N = u.N, p.K = u.K, p.scale = u.scale;
  p.query = u.query, p.keys = u.keys, p.mask = u.mask, p.range = u.range, p.lse = u.lse;
  p.rule = Rule::usage;
  return p;
}

}  // namespace

void slot_usage(const Device& device, const SlotUsage& u) {
  PairSums out{};
  out.usage = u.usage;
  sum_pairs_by_slots(device, "slot_usage", pairs_of(u), out);
}

void slot_usage_backward(const Device& device, const SlotUsageBackward& b) {
  Pairs p = pairs_of(b.forward);
  p.d_usage = b.d_usage;
  PairSums out{};
  out.d_query = b.d_query, out.d_lse = b.d_lse, out.d_keys = b.d_keys, out.d_mask = b.d_mask;
  sum_pairs(device, "slot_usage_backward", p, out);
}

}  // namespace mk::cuda
