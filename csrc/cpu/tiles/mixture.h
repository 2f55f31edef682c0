// Parts of the mixture of a language model and a cache:  p(w) = (1 - mix) own(w) + mix cached(w).
#pragma once

#include "cpu/tiles/online_softmax.h"
#include "cpu/tiles/parallel.h"
#include "cpu/tiles/rows.h"
#include "cpu/tiles/streaming.h"
#include "params/cache_mix.h"

namespace mk::MK_ISA {

constexpr int64_t kRowBlock = 2048;  // numbers of a row that stay in L1 between two passes

// Calls body(first column, numbers of F, count) for the blocks of a row of any dtype; `buffer` has kRowBlock numbers.
template <class F, class Body>
inline void each_block(const char* row, DType dtype, int64_t n, F* buffer, Body&& body) {
  for (int64_t i = 0; i < n; i += kRowBlock) {
    const int64_t count = least(kRowBlock, n - i);
    body(i, row_as<F>(row + i * size_of(dtype), dtype, count, buffer), count);
  }
}

// Does a row of a result over all words take non-temporal stores?
template <class F>
inline bool is_non_temporal(const F* row, const CacheMix& p) {
  const int64_t bytes = p.W * int64_t(sizeof(F));
  return is_non_temporal(row, 0, p.lead.batches() * p.lead.folded() * p.T * bytes);
}

// Prefetches n numbers one page further on, since hardware prefetch stops at the end of a page. Without it, reading the
// logits of cache_nll (T=256 W=32000, one core) takes 1.5 times as long.
template <class F>
MK_INLINE void prefetch_next_page(const F* x, int n) {
  for (int i = 0; i < n; i += 64 / int(sizeof(F))) __builtin_prefetch(reinterpret_cast<const char*>(x + i) + 4096);
}

// Register j of count numbers, -inf beyond the last.
template <class F>
MK_INLINE Vec<F> load_or_least(const F* x, int64_t j, int64_t count) {
  if (j + kLanes<F> <= count) return load<F>(x + j);
  F lanes[kLanes<F>];
  for (int i = 0; i < kLanes<F>; ++i) lanes[i] = j + i < count ? x[j + i] : -kInf<F>;
  return load<F>(lanes);
}

// A running log-sum-exp with one sum per lane: exp(x - m) with a reference m, which changes only if a number exceeds it
// by more than kSlack. So numbers from memory are read once, and rescaling is rare.
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
  MK_INLINE void add(Vec<F> a) { l += exp<F>(a - base); }
  MK_INLINE void add(Vec<F> a, Vec<F> b) { l += exp<F>(a - base) + exp<F>(b - base); }
  LogSumExp<F> value() const {
    const F top = largest<F>(m);
    const F total = sum<F>(l * (m == -kInf<F> ? fill<F>(0) : exp<F>(m - top)));
    return {top, total};
  }
};

// LogSum, the largest number, and sum (x - m) exp(x - m), from which the entropy follows.
template <class F>
struct MomentSum {
  LogSum<F> sums;
  Vec<F> moment = fill<F>(0), top = fill<F>(-kInf<F>);

  MK_INLINE void meet(Vec<F> high) {
    top = max<F>(high, top);
    const Vec<F> m = sums.m, l = sums.l;
    sums.meet(high);
    if (__builtin_expect(!any<F>(sums.m > m), 1)) return;
    const Vec<F> shift = m == -kInf<F> ? fill<F>(0) : m - sums.m;
    moment = (m == -kInf<F> ? fill<F>(0) : exp<F>(shift)) * (moment + l * shift);
  }
  MK_INLINE void add(Vec<F> a, Vec<F> b) {
    const Vec<F> x = a - sums.base, y = b - sums.base, e = exp<F>(x), f = exp<F>(y);
    sums.l += e + f;
    moment += e * max<F>(x, fill<F>(kNothing)) + f * max<F>(y, fill<F>(kNothing));
  }
  MK_INLINE void add(Vec<F> a) {
    const Vec<F> x = a - sums.base, e = exp<F>(x);
    sums.l += e;
    moment += e * max<F>(x, fill<F>(kNothing));
  }

  static constexpr F kNothing = -1000;  // exp is 0 here, for double too: 0 * -inf would be NaN
};

// Of the distribution over the words of a row: log-sum-exp, the largest probability, the entropy in nats.
template <class F>
struct RowStats {
  LogSumExp<F> end;
  F largest = 0, entropy = 0;

  RowStats() = default;
  explicit RowStats(const MomentSum<F>& found) : end(found.sums.value()) {
    if (end.lse == -kInf<F>) return;
    const Vec<F> m = found.sums.m;
    const F top = mk::MK_ISA::largest<F>(m);
    const Vec<F> shift = m == -kInf<F> ? fill<F>(0) : m - top;
    const Vec<F> factor = m == -kInf<F> ? fill<F>(0) : exp<F>(shift);
    const F total = sum<F>(found.sums.l * factor), moment = sum<F>(factor * (found.moment + found.sums.l * shift));
    largest = std::exp(end.log_share(mk::MK_ISA::largest<F>(found.top)));
    entropy = std::log(total) - moment / total;
    entropy = entropy < 0 ? F(0) : entropy;
  }
};

// Gives the numbers of a row to meet() and add() of running sums, in registers of F.
template <class F, class Sums>
MK_INLINE void sum_row(const char* row, DType dtype, int64_t n, F* buffer, Sums& sums) {
  constexpr int W = kLanes<F>;
  each_block<F>(row, dtype, n, buffer, [&](int64_t, const F* x, int64_t count) {
    int64_t j = 0;
    for (; j + 4 * W <= count; j += 4 * W) {
      prefetch_next_page(x + j, 4 * W);
      const Vec<F> a = load<F>(x + j), b = load<F>(x + j + W), c = load<F>(x + j + 2 * W), d = load<F>(x + j + 3 * W);
      sums.meet(max<F>(max<F>(a, b), max<F>(c, d)));
      sums.add(a, b), sums.add(c, d);
    }
    for (; j < count; j += W) {
      const Vec<F> a = load_or_least<F>(x, j, count);
      sums.meet(a);
      sums.add(a);
    }
  });
}

template <class F>
inline LogSumExp<F> row_lse(const char* row, DType dtype, int64_t n, F* buffer) {
  LogSum<F> sums;
  sum_row<F>(row, dtype, n, buffer, sums);
  return sums.value();
}

template <class F>
inline RowStats<F> row_stats(const char* row, DType dtype, int64_t n, F* buffer) {
  MomentSum<F> sums;
  sum_row<F>(row, dtype, n, buffer, sums);
  return RowStats<F>(sums);
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

// One word of the mixture: log p, the shares of the model and of the cache in p, and d log p / d mix. If p is 0, the
// others are 0 too.
template <class F>
struct Word {
  F log_p, own, cache, d_mix;

  // A word that no entry names.
  static Word alone(F log_own, F mix) {
    const F log_p = mix == 1 ? -kInf<F> : log_own + std::log1p(-mix);
    if (log_p == -kInf<F>) return {log_p, 0, 0, 0};
    return {log_p, 1, 0, -1 / (1 - mix)};
  }
  static Word mixed(F log_own, F cached, F mix) {
    const F own = std::exp(log_own), p = (1 - mix) * own + mix * cached;
    // p underflows: the cache gives it nothing, or almost nothing, and the model's share is below the smallest number.
    if (p < std::numeric_limits<F>::min()) return alone(log_own, mix);
    return {std::log(p), (1 - mix) * own / p, mix * cached / p, (cached - own) / p};
  }
};

// Runs body(begin, end, scratch memory) over all tokens, batch after batch, in parallel parts.
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
// The log-sum-exp of a token's logits, as saved by the forward pass.
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
