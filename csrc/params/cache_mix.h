#pragma once

#include "params/isa.h"
#include "params/view.h"

namespace mk {

// A language model mixed with a cache:
//  p[t, w] = (1 - mix_t) softmax(logits_t)[w] + mix_t sum_{j: tokens[t, j] = w} softmax(scores_t)_j
// Tokens and targets have been checked; -1 is no word. Where every entry is empty, mix counts as 0.
struct CacheMix {
  Lead lead;
  int64_t T, W, N;
  View logits, scores, tokens, mix;
  View lse, lse_rest;  // of the logits
};

struct CacheLogprobs {
  CacheMix mix;
  View logprobs;
};

struct CacheNll {
  CacheMix mix;
  View targets;
  View nll;
  bool stats;             // otherwise the next two are 0
  View largest, entropy;  // of softmax(logits)
};

// Gradients, float (double for double); a missing d_<argument> is not wanted.
struct CacheGradients {
  View logits, scores, mix;
};

struct CacheLogprobsBackward {
  CacheMix mix;
  View d_logprobs;
  CacheGradients d;
};

struct CacheNllBackward {
  CacheMix mix;
  View targets, entropy;
  View d_nll, d_lse, d_largest, d_entropy;  // a missing one is zero
  CacheGradients d;
};

}  // namespace mk

MK_DECLARE(void, cache_logprobs, CacheLogprobs)
MK_DECLARE(void, cache_logprobs_backward, CacheLogprobsBackward)
MK_DECLARE(void, cache_nll, CacheNll)
MK_DECLARE(void, cache_nll_backward, CacheNllBackward)
