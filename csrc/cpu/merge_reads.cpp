// merge_reads:  lse_t = log sum_s exp(lse[s, t]),  w[s, t] = exp(lse[s, t] - lse_t),  r_t = sum_s w[s, t] r[s, t]
// backward:     d_r[s, t] = w[s, t] dr_t,  d_lse[s, t] = w[s, t] (<dr_t, r[s, t]> - sum_u w[u, t] <dr_t, r[u, t]> +
// d_lse_t)
//
// Tokens run in parallel, tiles of 64; lanes run along the value width. Every read is loaded once and every result
// stored once: bound by bandwidth. A part with weight 0 is never looked at, its read may hold anything. The backward
// sums w <dr, r_s> itself instead of using the merged read, which has been rounded to the dtype of the reads.
#include "params/merge_reads.h"

#include "cpu/tiles/parallel.h"
#include "cpu/tiles/rows.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t kTile = 64;

// The rows of all parts: reads[s, t] or lses[s, t].
struct Parts {
  TokenRows rows;
  int64_t part = 0;
  Parts(const View& v, int64_t part, const Lead& lead, int64_t T) : rows(v, lead, 0, T), part(part) {}
  explicit operator bool() const { return bool(rows); }
  char* at(int64_t s, int64_t t) const { return rows.row(t) + s * part; }
};

// w[s] of one token; returns its lse. Nothing addressable: all 0 and -inf.
template <class F>
F weigh(const Parts& lses, int64_t S, int64_t t, F* w) {
  F m = -kInf<F>;
  for (int64_t s = 0; s < S; ++s) {
    w[s] = *reinterpret_cast<const F*>(lses.at(s, t));
    m = w[s] > m ? w[s] : m;  // a NaN is never the largest: it arrives through the sum
  }
  const F base = std::isinf(m) ? F(0) : m;
  F l = 0;
  for (int64_t s = 0; s < S; ++s) l += w[s] = std::exp(w[s] - base);
  if (l == 0) return -kInf<F>;
  for (int64_t s = 0; s < S; ++s) w[s] /= l;
  return base + std::log(l);
}

template <class F>
void add(F w, const F* __restrict x, int64_t n, F* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] += w * x[i];
}

template <class F>
F dot(const F* x, const F* y, int64_t n) {
  constexpr int W = kLanes<F>;
  Vec<F> acc = fill<F>(0);
  int64_t i = 0;
  for (; i + W <= n; i += W) acc += load<F>(x + i) * load<F>(y + i);
  if (i < n) acc += load_first<F>(x + i, n - i) * load_first<F>(y + i, n - i);
  return sum<F>(acc);
}

template <class F, class Body>
void each_token(const MergeReads& p, Body&& body) {
  const int64_t tokens = p.lead.folded() * p.T;
  Arena measure;
  for (int i = 0; i < 2; ++i) measure.take<F>(p.S), measure.take<F>(p.V);
  parallel(div_up(tokens, kTile), measure.used(), [&](int64_t task, char* memory) {
    const int64_t end = least(tokens, (task + 1) * kTile);
    for (int64_t t = task * kTile; t < end; ++t) body(t, Arena(memory));
  });
}

template <class F>
void forward(const MergeReads& p) {
  const Parts reads(p.reads, p.reads_part, p.lead, p.T), lses(p.lses, p.lses_part, p.lead, p.T);
  const TokenRows read(p.read, p.lead, 0, p.T), lse(p.lse, p.lead, 0, p.T);
  each_token<F>(p, [&](int64_t t, Arena arena) {
    F* w = arena.take<F>(p.S);
    F* sum = arena.take<F>(p.V);
    F* buffer = arena.take<F>(p.V);
    *reinterpret_cast<F*>(lse.row(t)) = weigh<F>(lses, p.S, t, w);
    for (int64_t v = 0; v < p.V; ++v) sum[v] = 0;
    for (int64_t s = 0; s < p.S; ++s) {
      if (w[s] != 0) add<F>(w[s], row_as<F>(reads.at(s, t), reads.rows.dtype, p.V, buffer), p.V, sum);
    }
    write_row<F>(sum, p.V, read.dtype, read.row(t));
  });
}

template <class F>
void backward(const MergeReadsBackward& b) {
  const MergeReads& p = b.forward;
  const Parts reads(p.reads, p.reads_part, p.lead, p.T), lses(p.lses, p.lses_part, p.lead, p.T);
  const Parts d_reads(b.d_reads, b.d_reads_part, p.lead, p.T), d_lses(b.d_lses, b.d_lses_part, p.lead, p.T);
  const TokenRows d_read(b.d_read, p.lead, 0, p.T), d_lse(b.d_lse, p.lead, 0, p.T);
  each_token<F>(p, [&](int64_t t, Arena arena) {
    F* w = arena.take<F>(p.S);
    F* x = arena.take<F>(p.S);
    F* row = arena.take<F>(p.V);
    F* buffer = arena.take<F>(p.V);
    weigh<F>(lses, p.S, t, w);
    const F* dr = d_read ? row_as<F>(d_read.row(t), d_read.dtype, p.V, row) : nullptr;
    if (d_lses) {
      F mean = 0;
      for (int64_t s = 0; s < p.S; ++s) {
        x[s] = 0;
        if (w[s] == 0 || dr == nullptr) continue;
        x[s] = dot<F>(dr, row_as<F>(reads.at(s, t), reads.rows.dtype, p.V, buffer), p.V);
        mean += w[s] * x[s];
      }
      const F d = d_lse ? *reinterpret_cast<const F*>(d_lse.row(t)) : F(0);
      for (int64_t s = 0; s < p.S; ++s) {
        const F g = w[s] == 0 ? F(0) : w[s] * (x[s] - mean + d);
        write_row<F>(&g, 1, d_lses.rows.dtype, d_lses.at(s, t));
      }
    }
    if (!d_reads) return;
    for (int64_t s = 0; s < p.S; ++s) {
      const bool counts = w[s] != 0 && dr != nullptr;
      for (int64_t v = 0; v < p.V; ++v) buffer[v] = counts ? w[s] * dr[v] : F(0);
      write_row<F>(buffer, p.V, d_reads.rows.dtype, d_reads.at(s, t));
    }
  });
}

}  // namespace

void merge_reads(const MergeReads& p) {
  if (p.reads.dtype == DType::f64) forward<double>(p);
  else forward<float>(p);
}

void merge_reads_backward(const MergeReadsBackward& p) {
  if (p.forward.reads.dtype == DType::f64) backward<double>(p);
  else backward<float>(p);
}

}  // namespace mk::MK_ISA
