// What the bindings of cache_logprobs and cache_nll share.
#pragma once

#include "binding/chosen_slots.h"
#include "params/cache_mix.h"

namespace mk {

// Guards the inputs and fills everything of `p` but lse.
struct CacheInputs {
  Arguments args;
  const Tensor *logits, *scores, *tokens, *mix, *targets = nullptr;

  CacheInputs(const char* op, const Tensor& z, const Tensor& c, const Tensor& j, const Tensor& m, const Tensor* y,
              CacheMix& p);
  void fill(CacheMix& p);  // after the last argument
};

// The gradients that are wanted.
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
