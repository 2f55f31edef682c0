// cache_nll:  nll_t = -log p_t,  p_t = (1 - mix) own + mix cached
//   own = exp(z_y - lse),  cached = sum_{j: token_j = y} softmax(c)_j
// and, of q = softmax(z), lse, the largest q and the entropy H = -sum_w q_w log q_w
//
// Tokens run in parallel. Forward: one pass over the logits, one over the entries; bound by reading the logits. With
// running sums l of e^(z - m) and s of (z - m) e^(z - m), H = log l - s / l.
// Backward, with g = -d nll / p and Q = the largest q:
//   dz_w = g (1 - mix) own ([w = y] - q_w) + d lse q_w - d H q_w (log q_w + H) + d Q Q ([w is largest] / ties - q_w)
//   dc_j = g mix softmax(c)_j ([token_j = y] - cached),  d mix = g (cached - own)
// in one pass that reads every logit and writes its gradient, with the saved lse and H; a gradient of Q needs one
// before it, to find the largest logit and how many are tied. A distribution over words is never stored.
#include "cpu/tiles/mixture.h"

namespace mk::MK_ISA {
namespace {

// The target of one token in the mixture.
template <class F>
struct Target {
  Entries<F> entries;
  int64_t word;
  F hit = 0, mix;  // sum of the exponentials of the entries that name the target
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
void put(F x, const View& out, const CacheMix& p, int64_t batch, int64_t t) {
  *reinterpret_cast<F*>(TokenRows(out, p.lead, batch, p.T).row(t)) = x;
}

template <class F>
void forward(const CacheNll& n) {
  const CacheMix& p = n.mix;
  each_token<F>(p, [&](int64_t batch, int64_t t, F* buffer, Arena& arena) {
    const TokenRows logits(p.logits, p.lead, batch, p.T);
    RowStats<F> stats;
    if (n.stats) stats = row_stats<F>(logits.row(t), logits.dtype, p.W, buffer);
    else stats.end = row_lse<F>(logits.row(t), logits.dtype, p.W, buffer);
    const LogSumExp<F>& end = stats.end;
    put(stats.largest, n.largest, p, batch, t), put(stats.entropy, n.entropy, p, batch, t);
    put_end(end, TokenRows(p.lse, p.lead, batch, p.T), TokenRows(p.lse_rest, p.lead, batch, p.T), t);
    const Target<F> target(p, n.targets, batch, t, end, arena);
    put(target.word < 0 ? F(0) : -target.at.log_p, n.nll, p, batch, t);
  });
}

// The gradient of the logits of one token:  dz_w = q_w (flat + slope log q_w) + peak [w is largest] / ties + at_target.
template <class F>
struct LogitGradient {
  F flat = 0, slope = 0, peak = 0, at_target = 0;

  LogitGradient(const CacheNllBackward& b, int64_t batch, int64_t t, const LogSumExp<F>& end, F share) {
    const CacheMix& p = b.mix;
    const auto d = [&](const View& v) { return v ? number<F>(v, p.lead, batch, p.T, t) : F(0); };
    flat = -share, at_target = share;
    if (end.lse == -kInf<F>) return;  // no word has a probability
    const F d_entropy = d(b.d_entropy);
    flat += d(b.d_lse);
    if (d_entropy != 0) flat -= d_entropy * number<F>(b.entropy, p.lead, batch, p.T, t), slope = -d_entropy;
    peak = d(b.d_largest);
  }
  bool nothing() const { return flat == 0 && slope == 0 && peak == 0 && at_target == 0; }
};

// The largest number of a row, and how often it is there.
template <class F>
std::pair<F, int64_t> largest_of_row(const char* row, DType dtype, int64_t n, F* buffer) {
  F top = -kInf<F>;
  int64_t ties = 0;
  each_block<F>(row, dtype, n, buffer, [&](int64_t, const F* x, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      if (x[j] > top) top = x[j], ties = 0;
      ties += x[j] == top;
    }
  });
  return {top, ties};
}

template <class F>
void logit_gradient(const CacheMix& p, int64_t batch, int64_t t, const LogSumExp<F>& end, LogitGradient<F> g,
                    int64_t target, F* out, F* buffer) {
  constexpr int W = kLanes<F>;
  const TokenRows logits(p.logits, p.lead, batch, p.T);
  const char* row = logits.row(t);
  if (g.nothing()) {
    std::memset(out, 0, size_t(p.W) * sizeof(F));
    return;
  }
  std::pair<F, int64_t> top;
  if (g.peak != 0) {
    top = largest_of_row<F>(row, logits.dtype, p.W, buffer);
    g.peak *= std::exp(end.log_share(top.first));
    g.flat -= g.peak;
  }
  const Vec<F> lse = fill<F>(end.lse), rest = fill<F>(end.rest);
  const auto each = [&](auto sloped, auto store) {
    each_block<F>(row, logits.dtype, p.W, buffer, [&](int64_t first, const F* z, int64_t count) {
      int64_t j = 0;
      for (; j + W <= count; j += W) {
        prefetch_next_page(z + j, W);
        const Vec<F> x = load<F>(z + j), q = weight<F>(x, lse, rest);
        if constexpr (sloped.value) {
          // Where q is 0, so is the product: the logarithm is kept finite.
          const Vec<F> log_q = max<F>((x - lse) - rest, fill<F>(MomentSum<F>::kNothing));
          store(out + first + j, q * (g.flat + g.slope * log_q));
        } else {
          store(out + first + j, g.flat * q);
        }
      }
      for (; j < count; ++j) {
        const F log_q = end.log_share(z[j]), q = std::exp(log_q);
        out[first + j] = q * (g.flat + (g.slope == 0 || q == 0 ? F(0) : g.slope * log_q));
      }
    });
  };
  with_stores(is_non_temporal(out, p), [&](auto store) {
    if (g.slope == 0) each(std::false_type{}, store);
    else each(std::true_type{}, store);
  });
  if (g.peak != 0) {
    each_block<F>(row, logits.dtype, p.W, buffer, [&](int64_t first, const F* z, int64_t count) {
      for (int64_t j = 0; j < count; ++j) out[first + j] += z[j] == top.first ? g.peak / F(top.second) : F(0);
    });
  }
  if (g.at_target != 0) out[target] += g.at_target;
}

template <class F>
void backward(const CacheNllBackward& b) {
  const CacheMix& p = b.mix;
  each_token<F>(p, [&](int64_t batch, int64_t t, F* buffer, Arena& arena) {
    const LogSumExp<F> end = saved_lse<F>(p, batch, t);
    const Target<F> target(p, b.targets, batch, t, end, arena);
    const Word<F>& y = target.at;
    const F d = target.word < 0 || !b.d_nll ? F(0) : -number<F>(b.d_nll, p.lead, batch, p.T, t);
    if (b.d.logits) {
      F* out = reinterpret_cast<F*>(TokenRows(b.d.logits, p.lead, batch, p.T).row(t));
      logit_gradient<F>(p, batch, t, end, {b, batch, t, end, d * y.own}, target.word, out, buffer);
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
    if (b.d.mix) put(d != 0 && !target.entries.empty() ? d * y.d_mix : F(0), b.d.mix, p, batch, t);
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
