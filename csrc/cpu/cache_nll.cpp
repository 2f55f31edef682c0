// cache_nll:  nll_t = -log p_t,  p_t = (1 - mix) own + mix cached
//   own = exp(z_y - lse),  cached = sum_{j: token_j = y} softmax(c)_j
//
// Tokens run in parallel. Forward: one pass over the logits for lse, one over the entries: bound by reading the logits.
// Backward, with g = -d nll / p:
//   dz_w = g (1 - mix) own ([w = y] - softmax(z)_w),  dc_j = g mix softmax(c)_j ([token_j = y] - cached),
//   d mix = g (cached - own)
// in one pass that reads every logit and writes its gradient, with lse as saved. No distribution over words is ever in
// memory.
#include "cpu/tiles/mixture.h"

namespace mk::MK_ISA {
namespace {

// The target of one token in the mixture.
template <class F>
struct Target {
  Entries<F> entries;
  int64_t word;
  F hit = 0, mix;  // sum of the exponentials of entries that name it
  Word<F> at;

  Target(const CacheMix& p, const View& targets, int64_t batch, int64_t t, const LogSumExp<F>& end, Arena& arena)
      : entries(TokenRows(p.scores, p.lead, batch, p.T).row(t), p.scores.dtype, words(p.tokens, p.lead, batch, p.T, t),
                p.N, arena.take<F>(p.N)),
        word(*words(targets, p.lead, batch, p.T, t)),
        mix(number<F>(p.mix, p.lead, batch, p.T, t)),
        at{0, 0, 0, 0} {
    if (word < 0) return;
    if (entries.empty()) mix = 0;
    for (int64_t j = 0; j < p.N; ++j) hit += entries.tokens[j] == word ? entries.e[j] : F(0);
    F z;
    read_row<F>(TokenRows(p.logits, p.lead, batch, p.T).row(t) + word * size_of(p.logits.dtype), p.logits.dtype, 1, &z);
    const F log_own = end.log_share(z);
    at = hit == 0 ? Word<F>::alone(log_own, mix) : Word<F>::mixed(log_own, hit / entries.total, mix);
  }
};

// Runs body(batch, token, buffer, arena) for all tokens.
template <class F, class Body>
void each_token(const CacheMix& p, Body&& body) {
  Arena measure;
  measure.take<F>(kRowBlock);
  measure.take<F>(p.N);
  each_task(p, measure.used(), [&](int64_t begin, int64_t end, char* memory) {
    const int64_t tokens = p.lead.folded() * p.T;
    for (int64_t t = begin; t < end; ++t) {
      Arena arena(memory);
      F* buffer = arena.take<F>(kRowBlock);
      body(t / tokens, t % tokens, buffer, arena);
    }
  });
}

template <class F>
void forward(const CacheNll& n) {
  const CacheMix& p = n.mix;
  each_token<F>(p, [&](int64_t batch, int64_t t, F* buffer, Arena& arena) {
    const TokenRows logits(p.logits, p.lead, batch, p.T);
    const LogSumExp<F> end = row_lse<F>(logits.row(t), logits.dtype, p.W, buffer);
    put_end(end, TokenRows(p.lse, p.lead, batch, p.T), TokenRows(p.lse_rest, p.lead, batch, p.T), t);
    const Target<F> target(p, n.targets, batch, t, end, arena);
    *reinterpret_cast<F*>(TokenRows(n.nll, p.lead, batch, p.T).row(t)) = target.word < 0 ? F(0) : -target.at.log_p;
  });
}

template <class F>
void backward(const CacheNllBackward& b) {
  constexpr int W = kLanes<F>;
  const CacheMix& p = b.mix;
  each_token<F>(p, [&](int64_t batch, int64_t t, F* buffer, Arena& arena) {
    const LogSumExp<F> end = saved_lse<F>(p, batch, t);
    const Vec<F> lse = fill<F>(end.lse), rest = fill<F>(end.rest);
    const Target<F> target(p, b.targets, batch, t, end, arena);
    const Word<F>& y = target.at;
    const F d = target.word < 0 ? F(0) : -number<F>(b.d_nll, p.lead, batch, p.T, t);
    if (b.d.logits) {
      F* out = reinterpret_cast<F*>(TokenRows(b.d.logits, p.lead, batch, p.T).row(t));
      const F share = d * y.own;
      if (share == 0) {
        std::memset(out, 0, size_t(p.W) * sizeof(F));
      } else {
        const TokenRows logits(p.logits, p.lead, batch, p.T);
        put_past(goes_past(out, p), [&](auto put) {
          each_block<F>(logits.row(t), logits.dtype, p.W, buffer, [&](int64_t first, const F* z, int64_t count) {
            int64_t j = 0;
            for (; j + W <= count; j += W) {
              ask_for_next_page(z + j, W);
              put(out + first + j, -share * weight<F>(load<F>(z + j), lse, rest));
            }
            for (; j < count; ++j) out[first + j] = -share * std::exp(end.log_share(z[j]));
          });
        });
        out[target.word] += share;
      }
    }
    if (b.d.scores) {
      F* out = reinterpret_cast<F*>(TokenRows(b.d.scores, p.lead, batch, p.T).row(t));
      const Entries<F>& c = target.entries;
      const F share = d * y.cache;
      for (int64_t j = 0; j < p.N; ++j) {
        out[j] = share == 0 || c.e[j] == 0
                     ? F(0)
                     : share * c.e[j] * ((c.tokens[j] == target.word ? 1 / target.hit : F(0)) - 1 / c.total);
      }
    }
    if (b.d.mix) {
      const bool counts = d != 0 && !target.entries.empty();
      *reinterpret_cast<F*>(TokenRows(b.d.mix, p.lead, batch, p.T).row(t)) = counts ? d * y.d_mix : F(0);
    }
  });
}

}  // namespace

void cache_nll(const CacheNll& p) {
  if (p.mix.logits.dtype == DType::f64) forward<double>(p);
  else forward<float>(p);
}

void cache_nll_backward(const CacheNllBackward& p) {
  if (p.mix.logits.dtype == DType::f64) backward<double>(p);
  else backward<float>(p);
}

}  // namespace mk::MK_ISA
