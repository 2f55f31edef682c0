// A softmax-weighted sum of values of which only (m, l, acc) is kept: the reference of the exponents, the sum of the
// exponentials, the sum of exponentials times values.
#pragma once

#include "cpu/tiles/scores.h"

namespace mk::MK_ISA {

// A reference for exponents that is only moved when a score exceeds it by more than this: rescaling is rare, sums stay finite.
constexpr int kSlack = 5;

// The logarithm of the sum of exponentials e^(s - m), l of them in all: `lse` to the digits of F, and what its rounding left out.
template <class F>
struct LogSumExp {
  F lse = -kInf<F>, rest = 0;

  LogSumExp() = default;
  LogSumExp(F m, F l) {
    if (l == 0) return;
    const F base = m == -kInf<F> ? F(0) : m, log = std::log(l);
    lse = base + log;
    rest = std::isinf(lse) ? F(0) : (base - lse) + log;
  }
  // log of the share that a score has in the sum.
  F log_share(F s) const { return (s - lse) - rest; }
};

// Writes them for token t. A missing view is not wanted.
template <class F>
inline void put_end(const LogSumExp<F>& end, const TokenRows& lse, const TokenRows& rest, int64_t t) {
  if (lse) *reinterpret_cast<F*>(lse.row(t)) = end.lse;
  if (rest) *reinterpret_cast<F*>(rest.row(t)) = end.rest;
}

// What one tile of tokens has of one range of slots: m, l [lanes] and acc.
template <class F>
struct Partial {
  F *m, *l, *acc;
};

// The softmax of one block of slots for n tokens, in place: rows of S, padded to whole registers with -inf, become
// exp(S - m); the row of acc of a token (VP numbers) is rescaled when m moves.
template <class F>
inline void exponential_rows(F* S, int64_t slots, int64_t n, int64_t VP, Partial<F> out) {
  constexpr int W = kLanes<F>;
  const int64_t padded = round_up(slots, W);
  for (int64_t t = 0; t < n; ++t) {
    F* s = S + t * kSlotBlock;
    Vec<F> tops = load<F>(s);
    for (int64_t r = W; r < padded; r += W) tops = max<F>(load<F>(s + r), tops);
    const F top = largest<F>(tops);
    if (top > out.m[t] + F(kSlack)) {
      const F factor = out.m[t] == -kInf<F> ? F(0) : std::exp(out.m[t] - top);
      out.l[t] *= factor;
      for (int64_t v = 0; v < VP; ++v) out.acc[t * VP + v] *= factor;
      out.m[t] = top;
    }
    const Vec<F> base = fill<F>(out.m[t] == -kInf<F> ? F(0) : out.m[t]);
    Vec<F> l = fill<F>(0);
    for (int64_t r = 0; r < padded; r += W) {
      const Vec<F> e = exp<F>(load<F>(s + r) - base);
      l += e;
      store<F>(s + r, e);
    }
    out.l[t] += sum<F>(l);
  }
}

// Sums the ranges of one token in order: row[0..V) is its read. acc of range r at parts[r].acc + at + v * stride.
template <class F>
inline LogSumExp<F> merge_ranges(const Partial<F>* parts, int64_t ranges, int64_t lane, int64_t at, int64_t stride,
                                 int64_t V, F* row) {
  F m = -kInf<F>;
  for (int64_t r = 0; r < ranges; ++r) m = parts[r].m[lane] > m ? parts[r].m[lane] : m;
  F l = 0;
  for (int64_t v = 0; v < V; ++v) row[v] = 0;
  for (int64_t r = 0; r < ranges; ++r) {
    const F mr = parts[r].m[lane];
    // A NaN score never enters the maximum: such a part counts whole, so that the NaN arrives.
    const F w = mr == m          ? F(1)
                : mr == -kInf<F> ? (parts[r].l[lane] == parts[r].l[lane] ? F(0) : F(1))
                                 : std::exp(mr - m);
    if (w == 0) continue;
    l += w * parts[r].l[lane];
    for (int64_t v = 0; v < V; ++v) row[v] += w * parts[r].acc[at + v * stride];
  }
  const F inverse = l == 0 ? F(0) : F(1) / l;
  for (int64_t v = 0; v < V; ++v) row[v] *= inverse;
  return {m, l};
}

// The same for a register of tokens, of which parts[r].acc + v * stride holds column v: rows[t * V + v] of token t, ends[t].
template <class F>
inline void merge_lanes(const Partial<F>* parts, int64_t ranges, int64_t lane, int64_t at, int64_t stride, int64_t V,
                        F* rows, LogSumExp<F>* ends) {
  constexpr int W = kLanes<F>;
  Vec<F> m = fill<F>(-kInf<F>), l = fill<F>(0);
  for (int64_t r = 0; r < ranges; ++r) m = max<F>(load<F>(parts[r].m + lane), m);
  const auto weight = [&](int64_t r) {
    const Vec<F> mr = load<F>(parts[r].m + lane), lr = load<F>(parts[r].l + lane);
    const Vec<F> none = lr == lr ? fill<F>(0) : fill<F>(1);  // a NaN score never enters the maximum
    return mr == m ? fill<F>(1) : mr == -kInf<F> ? none : exp<F>(mr - m);
  };
  // What has no weight may be infinite.
  const auto share = [](Vec<F> w, Vec<F> x) { return w == 0 ? fill<F>(0) : w * x; };
  for (int64_t r = 0; r < ranges; ++r) l += share(weight(r), load<F>(parts[r].l + lane));
  const Vec<F> inverse = l == 0 ? fill<F>(0) : F(1) / l;
  for (int64_t v = 0; v < V; v += W) {
    const int64_t columns = least(W, V - v);
    Vec<F> x[W];
    for (int i = 0; i < W; ++i) x[i] = fill<F>(0);
    for (int64_t r = 0; r < ranges; ++r) {
      const Vec<F> w = weight(r);
      const F* acc = parts[r].acc + at + v * stride;
      for (int64_t i = 0; i < columns; ++i) x[i] += share(w, load<F>(acc + i * stride));
    }
    for (int i = 0; i < W; ++i) x[i] *= inverse;
    transpose<F>(x);
    for (int t = 0; t < W; ++t) {
      if (columns == W) store<F>(rows + t * V + v, x[t]);
      else
        for (int64_t i = 0; i < columns; ++i) rows[t * V + v + i] = x[t][i];
    }
  }
  for (int t = 0; t < W; ++t) ends[t] = {m[t], l[t]};
}

}  // namespace mk::MK_ISA
