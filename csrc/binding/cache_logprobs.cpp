#include "binding/cache_inputs.h"

namespace mk {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& cache_scores, const Tensor& cache_tokens,
                                           const Tensor& mix) {
  CacheLogprobs p;
  CacheInputs in("cache_logprobs", logits, cache_scores, cache_tokens, mix, nullptr, p.mix);
  in.fill(p.mix);
  const ScalarType stats = stats_type(logits.scalar_type());
  Tensor logprobs = empty(in.args.sizes(Side::tokens, {p.mix.T, p.mix.W}), stats);
  Tensor lse = empty(in.args.sizes(Side::tokens, {p.mix.T}), stats);
  Tensor rest = empty(in.args.sizes(Side::tokens, {p.mix.T}), stats);
  p.logprobs = in.args.view(logprobs, 2), p.mix.lse = in.args.view(lse, 1), p.mix.lse_rest = in.args.view(rest, 1);
  MK_CALL(cache_logprobs, p);
  return {logprobs, lse, rest};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& logits, const Tensor& cache_scores,
                                            const Tensor& cache_tokens, const Tensor& mix, const Tensor& lse,
                                            const Tensor& lse_rest, const std::optional<Tensor>& d_logprobs,
                                            const std::vector<bool>& wants) {
  CacheLogprobsBackward p;
  CacheInputs in("cache_logprobs_backward", logits, cache_scores, cache_tokens, mix, nullptr, p.mix);
  in.args.require(wants.size() == 3, "wants must have 3 entries");
  in.args.require(d_logprobs.has_value(), "d_logprobs must be given");
  const Tensor* l = &in.args.add("lse", lse, Side::tokens, {p.mix.T});
  const Tensor* lr = &in.args.add("lse_rest", lse_rest, Side::tokens, {p.mix.T});
  const Tensor* d = &in.args.add("d_logprobs", *d_logprobs, Side::tokens, {p.mix.T, p.mix.W});
  in.args.stats({l, lr, d}, logits);
  in.fill(p.mix);
  p.mix.lse = in.args.view(l, 1), p.mix.lse_rest = in.args.view(lr, 1), p.d_logprobs = in.args.view(d, 2);
  const CacheResults out(in, wants);
  p.d = out.views();
  MK_CALL(cache_logprobs_backward, p);
  return out.results();
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "cache_logprobs", &mk::forward);
  MK_OPERATOR(m, "cache_logprobs_backward", &mk::backward);
}
