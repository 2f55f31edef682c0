// Gradients of softmax_read: products of tiles for many tokens (gradient_tiles.h), else sums over pairs (pair_sums.h).
#include "cuda/tiles/pair_sums.h"
#include "cuda/tiles/read_ranges.h"

namespace mk::cuda {

void softmax_read_backward(const Device& device, const SoftmaxReadBackward& b) {
  const SoftmaxRead& f = b.forward;
  Pairs p{};
  p.lead = f.lead, p.T = f.T, p.N = f.N, p.K = f.K, p.V = f.V, p.scale = f.scale;
  p.query = f.query, p.keys = f.keys, p.values = f.values, p.mask = f.mask, p.range = f.range;
  p.d_read = b.d_read;
  p.lse = f.lse, p.lse_rest = f.lse_rest, p.rule = Rule::softmax;
  p.terms = terms_of(device, "softmax_read_backward", p, b.d_read, f.read, b.d_lse, f.V);
  if (f.lead.folded() * f.T > kFew && tiles_take(device, b)) return softmax_read_tiles_backward(device, b, p.terms);
  PairSums out{};
  out.d_query = b.d_query, out.d_keys = b.d_keys, out.d_values = b.d_values, out.d_mask = b.d_mask;
  sum_pairs(device, "softmax_read_backward", p, out);
}

}  // namespace mk::cuda
