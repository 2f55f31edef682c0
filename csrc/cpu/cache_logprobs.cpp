// cache_logprobs:  log p[t, w],  p = (1 - mix) own + mix cached
//   own = softmax(z),  cached_w = sum_{j: token_j = w} softmax(c)_j
//
// Tokens run in parallel. All words are written as if no entry named them, log own + log(1 - mix); then the words of
// the entries, whose shares have been added up in the order of the entries, are written again. Bound by reading the
// logits twice (the second time from cache) and writing the result. The shares lie in a row of W numbers per thread of
// which only those of the entries are touched.
//
// Backward: with g_w = d_w * (share of the model in p_w) and h_w = d_w * (share of the cache),
//   dz = g - own sum(g),  dc_j = (h / cached)_{token_j} softmax(c)_j - softmax(c)_j sum(h),
//   d mix = sum_w d_w (cached - own) / p
// g is d but for the words of the entries.
#include "cpu/tiles/mixture.h"

namespace mk::MK_ISA {
namespace {

// The entries of one token, gathered by word.
template <class F>
struct Gathered {
  Entries<F> entries;
  F mix;
  F* sums;  // [W], of the exponentials; 0 where no entry names the word
  int64_t* distinct;
  int64_t n = 0;

  // `sums` is zero before, and after clear().
  Gathered(const CacheMix& p, int64_t batch, int64_t t, F* sums, Arena& arena)
      : entries(TokenRows(p.scores, p.lead, batch, p.T).row(t), p.scores.dtype, words(p.tokens, p.lead, batch, p.T, t),
                p.N, arena.take<F>(p.N)),
        mix(number<F>(p.mix, p.lead, batch, p.T, t)),
        sums(sums),
        distinct(arena.take<int64_t>(p.N)) {
    if (entries.empty()) mix = 0;
    for (int64_t j = 0; j < p.N; ++j) {
      if (entries.e[j] == 0) continue;
      F& at = sums[entries.tokens[j]];
      if (at == 0) distinct[n++] = entries.tokens[j];
      at += entries.e[j];
    }
  }
  Word<F> word(int64_t w, F log_own) const { return Word<F>::mixed(log_own, sums[w] / entries.total, mix); }
  void clear() {
    for (int64_t i = 0; i < n; ++i) sums[distinct[i]] = 0;
  }
};

template <class F>
F logit(const TokenRows& logits, int64_t t, int64_t word) {
  F z;
  read_row<F>(logits.row(t) + word * size_of(logits.dtype), logits.dtype, 1, &z);
  return z;
}

template <class F, class Body>
void each_gathered(const CacheMix& p, Body&& body) {
  Arena measure;
  measure.take<F>(kRowBlock);
  measure.take<F>(p.N);
  measure.take<int64_t>(p.N);
  const size_t own = measure.used();
  measure.take<F>(p.W);
  each_task(p, measure.used(), [&](int64_t begin, int64_t end, char* memory) {
    F* sums = reinterpret_cast<F*>(memory + own);
    std::memset(sums, 0, size_t(p.W) * sizeof(F));
    const int64_t tokens = p.lead.folded() * p.T;
    for (int64_t at = begin; at < end; ++at) {
      Arena arena(memory);
      F* buffer = arena.take<F>(kRowBlock);
      Gathered<F> cache(p, at / tokens, at % tokens, sums, arena);
      body(at / tokens, at % tokens, cache, buffer);
      cache.clear();
    }
  });
}

template <class F>
void forward(const CacheLogprobs& c) {
  constexpr int W = kLanes<F>;
  const CacheMix& p = c.mix;
  each_gathered<F>(p, [&](int64_t batch, int64_t t, const Gathered<F>& cache, F* buffer) {
    const TokenRows logits(p.logits, p.lead, batch, p.T);
    F* out = reinterpret_cast<F*>(TokenRows(c.logprobs, p.lead, batch, p.T).row(t));
    const LogSumExp<F> end = row_lse<F>(logits.row(t), logits.dtype, p.W, buffer);
    put_end(end, TokenRows(p.lse, p.lead, batch, p.T), TokenRows(p.lse_rest, p.lead, batch, p.T), t);
    const F left = cache.mix == 1 ? -kInf<F> : std::log1p(-cache.mix);
    put_past(goes_past(out, p), [&](auto put) {
      each_block<F>(logits.row(t), logits.dtype, p.W, buffer, [&](int64_t first, const F* z, int64_t count) {
        int64_t j = 0;
        for (; j + W <= count; j += W) put(out + first + j, ((load<F>(z + j) - end.lse) - end.rest) + left);
        for (; j < count; ++j) out[first + j] = end.log_share(z[j]) + left;
      });
    });
    for (int64_t i = 0; i < cache.n; ++i) {
      const int64_t w = cache.distinct[i];
      out[w] = cache.word(w, end.log_share(logit<F>(logits, t, w))).log_p;
    }
  });
}

template <class F>
void backward(const CacheLogprobsBackward& b) {
  constexpr int W = kLanes<F>;
  const CacheMix& p = b.mix;
  each_gathered<F>(p, [&](int64_t batch, int64_t t, Gathered<F>& cache, F* buffer) {
    const TokenRows logits(p.logits, p.lead, batch, p.T);
    const F* d = reinterpret_cast<const F*>(TokenRows(b.d_logprobs, p.lead, batch, p.T).row(t));
    const LogSumExp<F> end = saved_lse<F>(p, batch, t);
    const Vec<F> lse = fill<F>(end.lse), rest = fill<F>(end.rest);
    const F alone = cache.mix == 1 ? F(0) : F(1);  // share of the model in words that no entry names

    // The sum of d over words that have a probability without the cache.
    F total = 0;
    each_block<F>(logits.row(t), logits.dtype, p.W, buffer, [&](int64_t first, const F* z, int64_t count) {
      Vec<F> sums = fill<F>(0);
      int64_t j = 0;
      for (; j + W <= count; j += W) sums += load<F>(z + j) == -kInf<F> ? fill<F>(0) : load<F>(d + first + j);
      F sum_of_rest = 0;
      for (; j < count; ++j) sum_of_rest += z[j] == -kInf<F> ? F(0) : d[first + j];
      total += sum<F>(sums) + sum_of_rest;
    });
    F own = alone * total, cached = 0, d_mix = 0, others = total;
    for (int64_t i = 0; i < cache.n; ++i) {
      const int64_t w = cache.distinct[i];
      const F z = logit<F>(logits, t, w), before = z == -kInf<F> ? F(0) : d[w];
      const Word<F> word = cache.word(w, end.log_share(z));
      own += d[w] * word.own - alone * before;
      cached += d[w] * word.cache;
      d_mix += d[w] * word.d_mix;
      others -= before;
    }
    if (b.d.logits) {
      F* out = reinterpret_cast<F*>(TokenRows(b.d.logits, p.lead, batch, p.T).row(t));
      put_past(goes_past(out, p), [&](auto put) {
        each_block<F>(logits.row(t), logits.dtype, p.W, buffer, [&](int64_t first, const F* z, int64_t count) {
          for (int64_t j = 0; j < count; j += W) {
            const bool full = j + W <= count;
            const Vec<F> x = full ? load<F>(z + j) : load_or_least<F>(z, j, count);
            const Vec<F> g = full ? load<F>(d + first + j) : load_first<F>(d + first + j, count - j);
            const Vec<F> dz = (x == -kInf<F> ? fill<F>(0) : alone * g) - own * weight<F>(x, lse, rest);
            if (full) {
              put(out + first + j, dz);
            } else {
              for (int64_t i = j; i < count; ++i) out[first + i] = dz[i - j];
            }
          }
        });
      });
      for (int64_t i = 0; i < cache.n; ++i) {
        const int64_t w = cache.distinct[i];
        const F log_own = end.log_share(logit<F>(logits, t, w));
        out[w] = d[w] * cache.word(w, log_own).own - own * std::exp(log_own);
      }
    }
    if (b.d.mix) {
      const bool counts = !cache.entries.empty();
      *reinterpret_cast<F*>(TokenRows(b.d.mix, p.lead, batch, p.T).row(t)) =
          counts ? d_mix - (cache.mix == 1 ? F(0) : others / (1 - cache.mix)) : F(0);
    }
    if (b.d.scores) {
      F* out = reinterpret_cast<F*>(TokenRows(b.d.scores, p.lead, batch, p.T).row(t));
      const Entries<F>& c = cache.entries;
      for (int64_t i = 0; i < cache.n; ++i) {  // from here on sums hold what an exponential of the word is worth
        const int64_t w = cache.distinct[i];
        const F share = d[w] * cache.word(w, end.log_share(logit<F>(logits, t, w))).cache;
        cache.sums[w] = share == 0 ? F(0) : share / cache.sums[w];
      }
      const F mean = cached == 0 ? F(0) : cached / c.total;
      for (int64_t j = 0; j < p.N; ++j) out[j] = c.e[j] == 0 ? F(0) : c.e[j] * (cache.sums[c.tokens[j]] - mean);
    }
  });
}

}  // namespace

void cache_logprobs(const CacheLogprobs& p) {
  if (p.mix.logits.dtype == DType::f64) forward<double>(p);
  else forward<float>(p);
}

void cache_logprobs_backward(const CacheLogprobsBackward& p) {
  if (p.mix.logits.dtype == DType::f64) backward<double>(p);
  else backward<float>(p);
}

}  // namespace mk::MK_ISA
