// address:  w[t, i] = softmax_i(s[t, i]), with lse from a softmax_read without values, or sigmoid(s[t, i]).
#include "cuda/tiles/pair_sums.h"
#include "params/address.h"

namespace mk::cuda {
namespace {

Pairs pairs_of(const Address& a) {
  Pairs p{};
  p.lead = a.lead, p.T = a.T, p.N = a.N, p.K = a.K, p.scale = a.scale;
  p.query = a.query, p.keys = a.keys, p.mask = a.mask, p.range = a.range, p.lse = a.lse, p.lse_rest = a.lse_rest;
  p.rule = a.sigmoid ? Rule::sigmoid : Rule::weights;
  return p;
}

}  // namespace

void address(const Device& device, const Address& a) { weigh_pairs(device, "address", pairs_of(a), a.weights); }

void address_backward(const Device& device, const AddressBackward& b) {
  Pairs p = pairs_of(b.forward);
  p.weights = b.forward.weights, p.d_weights = b.d_weights;
  if (p.rule == Rule::weights) p.terms = terms_of(device, "address_backward", p, p.weights, p.d_weights, View{}, p.N);
  PairSums out{};
  out.d_query = b.d_query, out.d_keys = b.d_keys, out.d_mask = b.d_mask;
  sum_pairs(device, "address_backward", p, out);
}

}  // namespace mk::cuda
