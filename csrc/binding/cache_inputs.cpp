#include "binding/cache_inputs.h"

namespace mk {

CacheInputs::CacheInputs(const char* op, const Tensor& z, const Tensor& c, const Tensor& j, const Tensor& m,
                         const Tensor* y, CacheMix& p)
    : args(op) {
  p.T = size_at(op, "logits", z, -2), p.W = size_at(op, "logits", z, -1), p.N = size_at(op, "cache_scores", c, -1);
  logits = &args.add("logits", z, Side::tokens, {p.T, p.W});
  scores = &args.add("cache_scores", c, Side::tokens, {p.T, p.N});
  tokens = &args.add("cache_tokens", j, Side::tokens, {p.T, p.N});
  mix = &args.add("mix", m, Side::tokens, {p.T});
  if (y != nullptr) targets = &args.add("targets", *y, Side::tokens, {p.T});
  args.floats({logits, scores, mix});
  args.require(mix->scalar_type() == stats_type(z.scalar_type()), "mix must be float32, or float64 beside float64");
  args.require(tokens->scalar_type() == ScalarType::Long, "cache_tokens must be int64");
  args.require(y == nullptr || y->scalar_type() == ScalarType::Long, "targets must be int64");
}

void CacheInputs::fill(CacheMix& p) {
  p.lead = args.lead();
  p.logits = args.view(logits, 2), p.scores = args.view(scores, 2), p.tokens = args.view(tokens, 2);
  p.mix = args.view(mix, 1);
  check_indices(args.op(), Choice{p.lead, p.T, p.N, p.W, p.tokens}, "cache_tokens");
  if (targets != nullptr) check_indices(args.op(), Choice{p.lead, p.T, 1, p.W, args.view(targets, 1)}, "targets");
}

}  // namespace mk
