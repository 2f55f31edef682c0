// Shared by the bindings of cache_logprobs and cache_nll.
#pragma once

#include "binding/chosen_slots.h"
#include "params/cache_mix.h"

namespace mk {

// Checks the inputs and fills in `p`, except for lse.
struct CacheInputs {
  Arguments args;
  const Tensor *logits, *scores, *tokens, *mix, *targets = nullptr;

  CacheInputs(const char* op, const Tensor& z, const Tensor& c, const Tensor& j, const Tensor& m, const Tensor* y,
              CacheMix& p);
  void fill(CacheMix& p);  // call it after the last argument is added
};

// The wanted gradients.
struct CacheResults {
  Gradient logits, scores, mix;

  CacheResults(CacheInputs& in, const std::vector<bool>& wants)
      : logits(in.args, in.logits, wants[0], Side::tokens, 2),
        scores(in.args, in.scores, wants[1], Side::tokens, 2),
        mix(in.args, in.mix, wants[2], Side::tokens, 1) {}
  CacheGradients views() const { return {logits.view(), scores.view(), mix.view()}; }
  std::tuple<Tensor, Tensor, Tensor> results() const { return {logits.result(), scores.result(), mix.result()}; }
};

}  // namespace mk
