// What the mixture of a language model and a cache is made of:  p(w) = (1 - mix) own(w) + mix cached(w).
#pragma once

#include "cpu/tiles/online_softmax.h"
#include "cpu/tiles/parallel.h"
#include "cpu/tiles/rows.h"
#include "cpu/tiles/streaming.h"
#include "params/cache_mix.h"

namespace mk::MK_ISA {

constexpr int64_t kRowBlock = 2048;  // numbers of a row that stay in L1 between two looks at them

// body(first column, numbers of F, count) for the blocks of a row of any dtype; `buffer` has kRowBlock numbers.
template <class F, class Body>
inline void each_block(const char* row, DType dtype, int64_t n, F* buffer, Body&& body) {
  for (int64_t i = 0; i < n; i += kRowBlock) {
    const int64_t count = least(kRowBlock, n - i);
    body(i, row_as<F>(row + i * size_of(dtype), dtype, count, buffer), count);
  }
}

// Does the row of a result over all words go past the caches?
template <class F>
inline bool goes_past(const F* row, const CacheMix& p) {
  const int64_t bytes = p.W * int64_t(sizeof(F));
  return goes_past(row, 0, p.lead.batches() * p.lead.folded() * p.T * bytes);
}

// Asks for what lies a page further on than n numbers in hand: hardware that follows a stream stops at the end of a page. Reading
// the logits of cache_nll (T=256 W=32000, one core) takes 1.5 times as long without.
template <class F>
MK_INLINE void ask_for_next_page(const F* x, int n) {
  for (int i = 0; i < n; i += 64 / int(sizeof(F))) __builtin_prefetch(reinterpret_cast<const char*>(x + i) + 4096);
}

// Register j of count numbers, -inf behind the last.
template <class F>
MK_INLINE Vec<F> load_or_least(const F* x, int64_t j, int64_t count) {
  if (j + kLanes<F> <= count) return load<F>(x + j);
  F lanes[kLanes<F>];
  for (int i = 0; i < kLanes<F>; ++i) lanes[i] = j + i < count ? x[j + i] : -kInf<F>;
  return load<F>(lanes);
}

// A log-sum-exp as it grows, a sum per lane: exp(x - m) with a reference m that is only moved when a number exceeds it
// by more than kSlack, so that the stream from memory meets no second pass and hardly ever a rescaling.
template <class F>
struct LogSum {
  Vec<F> m = fill<F>(-kInf<F>), base = fill<F>(0), l = fill<F>(0);

  MK_INLINE void meet(Vec<F> top) {
    if (__builtin_expect(!any<F>(top > m + F(kSlack)), 1)) return;
    const Vec<F> moved = max<F>(top, m);
    l *= m == -kInf<F> ? fill<F>(0) : exp<F>(m - moved);
    m = moved;
    base = m == -kInf<F> ? fill<F>(0) : m;
  }
  MK_INLINE Vec<F> term(Vec<F> x) const { return exp<F>(x - base); }
  LogSumExp<F> value() const {
    const F top = largest<F>(m);
    const F total = sum<F>(l * (m == -kInf<F> ? fill<F>(0) : exp<F>(m - top)));
    return {top, total};
  }
};

template <class F>
inline LogSumExp<F> row_lse(const char* row, DType dtype, int64_t n, F* buffer) {
  constexpr int W = kLanes<F>;
  LogSum<F> sums;
  each_block<F>(row, dtype, n, buffer, [&](int64_t, const F* x, int64_t count) {
    int64_t j = 0;
    for (; j + 4 * W <= count; j += 4 * W) {
      ask_for_next_page(x + j, 4 * W);
      const Vec<F> a = load<F>(x + j), b = load<F>(x + j + W), c = load<F>(x + j + 2 * W), d = load<F>(x + j + 3 * W);
      sums.meet(max<F>(max<F>(a, b), max<F>(c, d)));
      sums.l += (sums.term(a) + sums.term(b)) + (sums.term(c) + sums.term(d));
    }
    for (; j < count; j += W) {
      const Vec<F> a = load_or_least<F>(x, j, count);
      sums.meet(a);
      sums.l += sums.term(a);
    }
  });
  return sums.value();
}

// The entries of one token: e_j = exp(score_j - largest), 0 for an empty entry, and their sum.
template <class F>
struct Entries {
  const int64_t* tokens;
  F* e;
  int64_t n;
  F total = 0;

  Entries(const char* scores, DType dtype, const int64_t* words, int64_t count, F* out)
      : tokens(words), e(out), n(count) {
    constexpr int W = kLanes<F>;
    read_row<F>(scores, dtype, n, e);
    for (int64_t j = 0; j < n; ++j) e[j] = tokens[j] < 0 ? -kInf<F> : e[j];
    Vec<F> tops = fill<F>(-kInf<F>);
    for (int64_t j = 0; j < n; j += W) tops = max<F>(load_or_least<F>(e, j, n), tops);
    const F top = largest<F>(tops), base = top == -kInf<F> ? F(0) : top;
    Vec<F> sums = fill<F>(0);
    for (int64_t j = 0; j < n; j += W) {
      const Vec<F> x = exp<F>(load_or_least<F>(e, j, n) - base);
      sums += x;
      F lanes[W];
      store<F>(lanes, x);
      for (int64_t i = j; i < least(j + W, n); ++i) e[i] = lanes[i - j];
    }
    total = sum<F>(sums);
  }
  bool empty() const { return total == 0; }
};

// One word of the mixture: log p, the shares of the model and of the cache in p, and d log p / d mix. All but log p are
// 0 where p is.
template <class F>
struct Word {
  F log_p, own, cache, d_mix;

  // Of a word that no entry names.
  static Word alone(F log_own, F mix) {
    const F log_p = mix == 1 ? -kInf<F> : log_own + std::log1p(-mix);
    if (log_p == -kInf<F>) return {log_p, 0, 0, 0};
    return {log_p, 1, 0, -1 / (1 - mix)};
  }
  static Word mixed(F log_own, F cached, F mix) {
    const F own = std::exp(log_own), p = (1 - mix) * own + mix * cached;
    // Nothing is left of p: the cache has no say, or next to none, and the model's share is below the smallest number.
    if (p < std::numeric_limits<F>::min()) return alone(log_own, mix);
    return {std::log(p), (1 - mix) * own / p, mix * cached / p, (cached - own) / p};
  }
};

// Runs body(begin, end, scratch memory) over all tokens, batch after batch, in parallel pieces.
template <class Body>
inline void each_task(const CacheMix& p, size_t bytes, Body&& body) {
  const int64_t all = p.lead.batches() * p.lead.folded() * p.T, step = most(1, 65536 / (p.W + p.N + 1));
  parallel(div_up(all, step), bytes, [&](int64_t task, char* memory) {
    FlushDenormals flush;
    body(task * step, least(all, (task + 1) * step), memory);
  });
}

template <class F>
inline F number(const View& v, const Lead& lead, int64_t batch, int64_t T, int64_t t) {
  return *reinterpret_cast<const F*>(TokenRows(v, lead, batch, T).row(t));
}
// The log-sum-exp of the logits of a token that the forward pass left behind.
template <class F>
inline LogSumExp<F> saved_lse(const CacheMix& p, int64_t batch, int64_t t) {
  LogSumExp<F> end;
  end.lse = number<F>(p.lse, p.lead, batch, p.T, t), end.rest = number<F>(p.lse_rest, p.lead, batch, p.T, t);
  return end;
}
inline const int64_t* words(const View& v, const Lead& lead, int64_t batch, int64_t T, int64_t t) {
  return reinterpret_cast<const int64_t*>(TokenRows(v, lead, batch, T).row(t));
}

}  // namespace mk::MK_ISA
