#include "binding/cache_inputs.h"

namespace mk {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& targets, const Tensor& cache_scores,
                                           const Tensor& cache_tokens, const Tensor& mix) {
  CacheNll p;
  CacheInputs in("cache_nll", logits, cache_scores, cache_tokens, mix, &targets, p.mix);
  in.fill(p.mix);
  p.targets = in.args.view(in.targets, 1);
  const ScalarType stats = stats_type(logits.scalar_type());
  Tensor nll = empty(in.args.sizes(Side::tokens, {p.mix.T}), stats);
  Tensor lse = empty(in.args.sizes(Side::tokens, {p.mix.T}), stats);
  Tensor rest = aid(in.args.sizes(Side::tokens, {p.mix.T}), stats);
  p.nll = in.args.view(nll, 1), p.mix.lse = in.args.view(lse, 1), p.mix.lse_rest = in.args.view(rest, 1);
  MK_CALL(cache_nll, p);
  return {nll, lse, rest};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& logits, const Tensor& targets, const Tensor& cache_scores,
                                            const Tensor& cache_tokens, const Tensor& mix, const Tensor& lse,
                                            const Tensor& lse_rest, const std::optional<Tensor>& d_nll,
                                            const std::vector<bool>& wants) {
  CacheNllBackward p;
  CacheInputs in("cache_nll_backward", logits, cache_scores, cache_tokens, mix, &targets, p.mix);
  in.args.require(wants.size() == 3, "wants must have 3 entries");
  in.args.require(d_nll.has_value(), "d_nll must be given");
  const Tensor* l = &in.args.add("lse", lse, Side::tokens, {p.mix.T});
  const Tensor* lr = &in.args.add("lse_rest", lse_rest, Side::tokens, {p.mix.T});
  const Tensor* d = &in.args.add("d_nll", *d_nll, Side::tokens, {p.mix.T});
  in.args.stats({l, lr, d}, logits);
  in.fill(p.mix);
  p.targets = in.args.view(in.targets, 1);
  p.mix.lse = in.args.view(l, 1), p.mix.lse_rest = in.args.view(lr, 1), p.d_nll = in.args.view(d, 1);
  const CacheResults out(in, wants);
  p.d = out.views();
  MK_CALL(cache_nll_backward, p);
  return out.results();
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "cache_nll", &mk::forward);
  MK_OPERATOR(m, "cache_nll_backward", &mk::backward);
}
