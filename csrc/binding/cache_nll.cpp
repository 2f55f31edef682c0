#include "binding/cache_inputs.h"

namespace mk {
namespace {

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five forward(const Tensor& logits, const Tensor& targets, const Tensor& cache_scores, const Tensor& cache_tokens,
             const Tensor& mix, bool stats) {
  CacheNll p;
  CacheInputs in("cache_nll", logits, cache_scores, cache_tokens, mix, &targets, p.mix);
  in.fill(p.mix);
  p.targets = in.args.view(in.targets, 1);
  p.stats = stats;
  const ScalarType dtype = stats_type(logits.scalar_type());
  const auto sizes = in.args.sizes(Side::tokens, {p.mix.T});
  Tensor nll = empty(sizes, dtype), lse = empty(sizes, dtype), rest = empty(sizes, dtype);
  Tensor largest = empty(sizes, dtype), entropy = empty(sizes, dtype);
  p.nll = in.args.view(nll, 1), p.mix.lse = in.args.view(lse, 1), p.mix.lse_rest = in.args.view(rest, 1);
  p.largest = in.args.view(largest, 1), p.entropy = in.args.view(entropy, 1);
  MK_CALL(cache_nll, p);
  return {nll, lse, rest, largest, entropy};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& logits, const Tensor& targets, const Tensor& cache_scores,
                                            const Tensor& cache_tokens, const Tensor& mix, const Tensor& lse,
                                            const Tensor& lse_rest, const Tensor& entropy,
                                            const std::optional<Tensor>& d_nll, const std::optional<Tensor>& d_lse,
                                            const std::optional<Tensor>& d_largest,
                                            const std::optional<Tensor>& d_entropy, bool stats,
                                            const std::vector<bool>& wants) {
  CacheNllBackward p;
  CacheInputs in("cache_nll_backward", logits, cache_scores, cache_tokens, mix, &targets, p.mix);
  in.args.require(wants.size() == 3, "wants must have 3 entries");
  in.args.require(stats || (!d_largest && !d_entropy), "d_largest and d_entropy must not be given without stats");
  const auto add = [&](const char* name, const std::optional<Tensor>& x) {
    return in.args.add(name, x, Side::tokens, {p.mix.T});
  };
  const Tensor *l = add("lse", lse), *lr = add("lse_rest", lse_rest), *h = add("entropy", entropy);
  const Tensor *d = add("d_nll", d_nll), *dl = add("d_lse", d_lse), *dp = add("d_largest", d_largest);
  const Tensor* dh = add("d_entropy", d_entropy);
  in.args.stats({l, lr, h, d, dl, dp, dh}, logits);
  in.fill(p.mix);
  p.targets = in.args.view(in.targets, 1);
  p.mix.lse = in.args.view(l, 1), p.mix.lse_rest = in.args.view(lr, 1), p.entropy = in.args.view(h, 1);
  p.d_nll = in.args.view(d, 1), p.d_lse = in.args.view(dl, 1);
  p.d_largest = in.args.view(dp, 1), p.d_entropy = in.args.view(dh, 1);
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
