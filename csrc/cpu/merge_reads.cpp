// merge_reads:  lse_t = log sum_s exp(lse[s, t]),  w[s, t] = exp(lse[s, t] - lse_t),  r_t = sum_s w[s, t] r[s, t]
// backward:
//   d_r[s, t] = w[s, t] dr_t,
//   d_lse[s, t] = w[s, t] (<dr_t, r[s, t]> - sum_u w[u, t] <dr_t, r[u, t]> + d_lse_t)
//
// Tokens run in parallel, in tiles of 64. Lanes are tokens for the weights, then run along the value width. Every read
// is loaded once and every result is stored once: bound by bandwidth. A part with weight 0 is never loaded and may hold
// anything. The backward computes the sum of w <dr, r_s> again instead of using the merged read, which was rounded to
// the dtype of the reads.
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
};

// Those of a tile: at(s, j) of token t0 + j.
class TileParts {
 public:
  TileParts(const Parts& parts, int64_t t0, int64_t n) : part_(parts.part) {
    if (parts) parts.rows.list(t0, n, first_);
  }
  char* at(int64_t s, int64_t j) const { return first_[j] + s * part_; }

 private:
  char* first_[kTile];
  int64_t part_;
};

// The weights of a tile of tokens, lanes are tokens.
template <class F>
class Weights {
 public:
  Weights(Arena& arena, int64_t S)
      : S_(S), w_(arena.take<F>(S * kTile)), base_(arena.take<F>(kTile)), total_(arena.take<F>(kTile)) {}
  static void measure(Arena& arena, int64_t S) { Weights(arena, S); }

  // w[s] of tokens [t0, t0 + n), and their lse. If nothing is addressable: all 0 and -inf.
  void weigh(const Parts& lses, int64_t t0, int64_t n) {
    const TileParts given(lses, t0, n);
    for (int64_t s = 0; s < S_; ++s) {
      F* row = w_ + s * kTile;
      for (int64_t j = 0; j < n; ++j) row[j] = *reinterpret_cast<const F*>(given.at(s, j));
      for (int64_t j = n; j < round_up(n, kLanes<F>); ++j) row[j] = -kInf<F>;
    }
    for (int64_t l = 0; l < n; l += kLanes<F>) {
      F* w = w_ + l;
      Vec<F> top = fill<F>(-kInf<F>), total = fill<F>(0);
      for (int64_t s = 0; s < S_; ++s) top = max<F>(load<F>(w + s * kTile), top);  // NaN reaches the result by the sum
      const Vec<F> base = top == kInf<F> || top == -kInf<F> ? fill<F>(0) : top;
      for (int64_t s = 0; s < S_; ++s) {
        const Vec<F> e = exp<F>(load<F>(w + s * kTile) - base);
        store<F>(w + s * kTile, e);
        total += e;
      }
      const Vec<F> whole = total == F(0) ? fill<F>(1) : total;
      for (int64_t s = 0; s < S_; ++s) store<F>(w + s * kTile, load<F>(w + s * kTile) / whole);
      store<F>(base_ + l, base);
      store<F>(total_ + l, total);
    }
  }
  const F* of(int64_t s) const { return w_ + s * kTile; }
  F lse(int64_t j) const { return base_[j] + std::log(total_[j]); }

 private:
  int64_t S_;
  F *w_, *base_, *total_;
};

// y = sum over `count` rows of w x
template <class F>
void mix(int64_t count, const F* w, const F* const* x, int64_t n, F* __restrict y) {
  constexpr int W = kLanes<F>;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    Vec<F> acc = fill<F>(0);
    for (int64_t s = 0; s < count; ++s) acc += w[s] * load<F>(x[s] + i);
    store<F>(y + i, acc);
  }
  for (; i < n; ++i) {
    y[i] = 0;
    for (int64_t s = 0; s < count; ++s) y[i] += w[s] * x[s][i];
  }
}

// Calls body(tokens [t0, t0 + n), arena, weights) with the weights computed.
template <class F, class Body>
void each_tile(const MergeReads& p, const Parts& lses, size_t scratch, Body&& body) {
  const int64_t tokens = p.lead.folded() * p.T;
  Arena measure;
  Weights<F>::measure(measure, p.S);
  parallel(div_up(tokens, kTile), measure.used() + scratch, [&](int64_t task, char* memory) {
    Arena arena(memory);
    Weights<F> weights(arena, p.S);
    const int64_t t0 = task * kTile, n = least(kTile, tokens - t0);
    weights.weigh(lses, t0, n);
    body(t0, n, arena, weights);
  });
}

template <class F>
void forward(const MergeReads& p) {
  const Parts reads(p.reads, p.reads_part, p.lead, p.T), lses(p.lses, p.lses_part, p.lead, p.T);
  const TokenRows read(p.read, p.lead, 0, p.T), lse(p.lse, p.lead, 0, p.T);
  const bool own = reads.rows.dtype == kOwn<F>;
  Arena measure;
  measure.take<const F*>(p.S), measure.take<F>(p.S), measure.take<F>(own ? 0 : p.S * p.V), measure.take<F>(p.V);
  each_tile<F>(p, lses, measure.used(), [&](int64_t t0, int64_t n, Arena arena, const Weights<F>& weights) {
    const F** x = arena.take<const F*>(p.S);
    F* w = arena.take<F>(p.S);
    F* buffer = arena.take<F>(own ? 0 : p.S * p.V);
    F* sum = arena.take<F>(p.V);
    const TileParts from(reads, t0, n);
    char *to[kTile], *to_lse[kTile];
    read.list(t0, n, to);
    lse.list(t0, n, to_lse);
    for (int64_t j = 0; j < n; ++j) {
      int64_t count = 0;
      for (int64_t s = 0; s < p.S; ++s) {
        w[count] = weights.of(s)[j];
        if (w[count] == 0) continue;
        x[count] = row_as<F>(from.at(s, j), reads.rows.dtype, p.V, buffer + count * p.V);
        ++count;
      }
      mix<F>(count, w, x, p.V, own ? reinterpret_cast<F*>(to[j]) : sum);
      if (!own) write_row<F>(sum, p.V, read.dtype, to[j]);
      *reinterpret_cast<F*>(to_lse[j]) = weights.lse(j);
    }
  });
}

// x[j] = <dr_j, r_j> of the tokens of a tile whose weight is not 0, else 0.
template <class F, class Row>
void dots(int64_t n, const F* w, const F* const* dr, Row&& row, int64_t V, F* x) {
  constexpr int W = kLanes<F>;
  for (int64_t j0 = 0; j0 < n; j0 += W) {
    Vec<F> acc[W];  // summed together: a sum over the lanes of one token takes longer than its products
    for (int64_t i = 0; i < W; ++i) {
      acc[i] = fill<F>(0);
      if (j0 + i >= n || w[j0 + i] == 0) continue;
      const F *a = dr[j0 + i], *b = row(j0 + i);
      int64_t v = 0;
      for (; v + W <= V; v += W) acc[i] += load<F>(a + v) * load<F>(b + v);
      if (v < V) acc[i] += load_first<F>(a + v, V - v) * load_first<F>(b + v, V - v);
    }
    store<F>(x + j0, sums<F>(acc));
  }
}

template <class F>
void backward(const MergeReadsBackward& b) {
  constexpr int W = kLanes<F>;
  const MergeReads& p = b.forward;
  const Parts reads(p.reads, p.reads_part, p.lead, p.T), lses(p.lses, p.lses_part, p.lead, p.T);
  const Parts d_reads(b.d_reads, b.d_reads_part, p.lead, p.T), d_lses(b.d_lses, b.d_lses_part, p.lead, p.T);
  const TokenRows d_read(b.d_read, p.lead, 0, p.T), d_lse(b.d_lse, p.lead, 0, p.T);
  const bool own = d_reads && d_reads.rows.dtype == kOwn<F>;
  Arena measure;
  measure.take<const F*>(kTile), measure.take<F>(kTile * p.V), measure.take<F>(p.V), measure.take<F>(p.S * kTile);
  each_tile<F>(p, lses, measure.used(), [&](int64_t t0, int64_t n, Arena arena, const Weights<F>& weights) {
    const F** dr = arena.take<const F*>(kTile);
    F* rows = arena.take<F>(kTile * p.V);
    F* buffer = arena.take<F>(p.V);
    F* x = arena.take<F>(p.S * kTile);
    char* given[kTile];
    if (d_read) d_read.list(t0, n, given);
    for (int64_t j = 0; j < n && d_read; ++j) dr[j] = row_as<F>(given[j], d_read.dtype, p.V, rows + j * p.V);
    if (d_lses) {
      const TileParts from(reads, t0, n), to(d_lses, t0, n);
      if (d_lse) d_lse.list(t0, n, given);
      std::memset(x, 0, size_t(p.S * kTile) * sizeof(F));
      F means[kTile] = {};
      for (int64_t s = 0; s < p.S && d_read; ++s) {
        const F* w = weights.of(s);
        const auto row = [&](int64_t j) { return row_as<F>(from.at(s, j), reads.rows.dtype, p.V, buffer); };
        dots<F>(n, w, dr, row, p.V, x + s * kTile);
        for (int64_t j = 0; j < n; ++j) means[j] += w[j] * x[s * kTile + j];
      }
      for (int64_t j = 0; j < n; ++j) {
        const F d = d_lse ? *reinterpret_cast<const F*>(given[j]) : F(0);
        for (int64_t s = 0; s < p.S; ++s) {
          const F w = weights.of(s)[j], g = w == 0 ? F(0) : w * (x[s * kTile + j] - means[j] + d);
          *reinterpret_cast<F*>(to.at(s, j)) = g;
        }
      }
    }
    if (!d_reads) return;
    const TileParts results(d_reads, t0, n);
    for (int64_t s = 0; s < p.S; ++s) {
      for (int64_t j = 0; j < n; ++j) {
        F *to = own ? reinterpret_cast<F*>(results.at(s, j)) : buffer, w = weights.of(s)[j];
        const bool counts = w != 0 && d_read;
        int64_t v = 0;
        for (; v + W <= p.V; v += W) store<F>(to + v, counts ? w * load<F>(dr[j] + v) : fill<F>(0));
        for (; v < p.V; ++v) to[v] = counts ? w * dr[j][v] : F(0);
        if (!own) write_row<F>(to, p.V, d_reads.rows.dtype, results.at(s, j));
      }
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
