// memory_gate:  r_x = 1 / sqrt(mean(x^2) + eps),  g = r_h r_k <h w, k> / sqrt(D),  w = w_h w_k,
//               s = sign(g) sqrt(max(|g|, 1e-6)) or g,  a = sigmoid(s),  out_b = a_b v
// backward, with da = <d_b, v>, ds = da a (1 - a), dg = ds / (2 sqrt(|g|)) or ds, c = dg r_h r_k / sqrt(D):
//               dv = sum_b a_b d_b,  dh = c k w - dg g r_h^2 h / D,  dk = c h w - dg g r_k^2 k / D,
//               dw_h = w_k G,  dw_k = w_h G,  G = sum_t c h k
//
// Tokens run in parallel, in tiles; lanes run along D. The forward pass reads a branch once for its three sums and
// writes once; the backward pass takes the statistics of the forward and reads every row once, a second time from L1 or
// L2. Both are bound by bandwidth, so results larger than the caches take non-temporal stores. G is summed per chunk of
// tokens; chunks depend on shapes only and are added in order.
#include "params/memory_gate.h"

#include <cmath>

#include "cpu/tiles/load_as.h"
#include "cpu/tiles/parallel.h"
#include "cpu/tiles/scores.h"
#include "cpu/tiles/streaming.h"

namespace mk::MK_ISA {
namespace {

constexpr double kLeast = 1e-6;          // under the square root
constexpr int64_t kTileBytes = 1 << 17;  // of a tensor per task
constexpr int64_t kChunks = 64;          // partial sums of the gradients of weights, at most

// Two registers of a row at a time.
template <class F>
struct Pair {
  Vec<F> x[2];
};

// Calls body.template operator()<whole>(c, live) for every two registers of n columns; the last may be partial.
template <class F, class Body>
MK_INLINE void each_pair(int64_t n, Body&& body) {
  constexpr int64_t unit = 2 * kLanes<F>;
  int64_t c = 0;
  for (; c + unit <= n; c += unit) body.template operator()<true>(c, unit);
  if (c < n) body.template operator()<false>(c, n - c);
}

template <class F, DType D, bool whole>
MK_INLINE Pair<F> pair_at(const char* row, int64_t c, int64_t live) {
  constexpr int W = kLanes<F>;
  const char* p = row + c * kSize<D>;
  if constexpr (whole) return {{load_as<F, D>(p), load_as<F, D>(p + W * kSize<D>)}};
  const int64_t first = least(live, W);
  return {{load_first_as<F, D>(p, first), load_first_as<F, D>(p + first * kSize<D>, live - first)}};
}
// A pair of a buffer that is padded to whole pairs.
template <class F>
MK_INLINE Pair<F> pair_of(const F* p) {
  return {{load<F>(p), load<F>(p + kLanes<F>)}};
}
template <class F>
MK_INLINE void save(F* p, const Pair<F>& v) {
  store<F>(p, v.x[0]), store<F>(p + kLanes<F>, v.x[1]);
}
template <class F, DType D, bool whole, class Put>
MK_INLINE void put_pair(const Pair<F>& v, char* row, int64_t c, int64_t live, Put put) {
  char* p = row + c * kSize<D>;
  if constexpr (!whole) {
    F lanes[2 * kLanes<F>];
    save<F>(lanes, v);
    write_row<F>(lanes, live, D, p);
  } else if constexpr (kSize<D> == int(sizeof(F))) {
    put(reinterpret_cast<F*>(p), v.x[0]), put(reinterpret_cast<F*>(p) + kLanes<F>, v.x[1]);
  } else {
    put(reinterpret_cast<float*>(p), narrowed<D>(v.x[0], v.x[1]));
  }
}

// What tasks share: where rows are, and the product of both weights, padded with zeros to whole pairs.
template <class F>
struct Rows {
  const MemoryGate& p;
  int64_t tokens, width, tile;
  TokenRows hidden, key, value, hidden_rstd, key_rstd, score;
  Buffer<F> w;

  explicit Rows(const MemoryGate& gate)
      : p(gate),
        tokens(p.lead.folded()),
        width(round_up(p.D, 2 * kLanes<F>)),
        tile(most(1, kTileBytes / most(1, p.B * p.D * size_of(p.hidden.dtype)))),
        hidden(p.hidden, p.lead, 0, p.B),
        key(p.key, p.lead, 0, p.B),
        value(p.value, p.lead, 0, 1),
        hidden_rstd(p.hidden_rstd, p.lead, 0, 1),
        key_rstd(p.key_rstd, p.lead, 0, 1),
        score(p.score, p.lead, 0, 1),
        w(p.B * width) {
    Buffer<F> other(width);
    for (int64_t b = 0; b < p.B; ++b) {
      F* row = w.data() + b * width;
      read_row<F>(p.hidden_weight.data + b * p.hidden_weight.row, p.hidden_weight.dtype, p.D, row);
      read_row<F>(p.key_weight.data + b * p.key_weight.row, p.key_weight.dtype, p.D, other.data());
      for (int64_t c = 0; c < p.D; ++c) row[c] *= other.data()[c];
      for (int64_t c = p.D; c < width; ++c) row[c] = 0;
    }
  }
  F* number(const TokenRows& rows, int64_t t, int64_t b) const { return reinterpret_cast<F*>(rows.row(t)) + b; }
  F root() const { return std::sqrt(F(most(p.D, 1))); }
};

template <class F>
F sigmoid_of(F score, bool signed_sqrt) {
  F s = score;
  if (signed_sqrt && score == score) {
    const F size = std::sqrt(std::fabs(score) > F(kLeast) ? std::fabs(score) : F(kLeast));
    s = score > 0 ? size : score < 0 ? -size : F(0);
  }
  const F e = std::exp(-std::fabs(s));
  return s >= 0 ? 1 / (1 + e) : s < 0 ? e / (1 + e) : s;
}

template <class F, DType D>
F gate_of(const Rows<F>& rows, int64_t t, int64_t b) {
  const MemoryGate& p = rows.p;
  const char *h = rows.hidden.row(t * p.B + b), *k = rows.key.row(t * p.B + b);
  const F* w = rows.w.data() + b * rows.width;
  Vec<F> hh[2] = {fill<F>(0), fill<F>(0)}, kk[2] = {hh[0], hh[0]}, hk[2] = {hh[0], hh[0]};
  each_pair<F>(p.D, [&]<bool whole>(int64_t c, int64_t live) {
    const Pair<F> x = pair_at<F, D, whole>(h, c, live), y = pair_at<F, D, whole>(k, c, live), u = pair_of<F>(w + c);
    for (int i = 0; i < 2; ++i) hh[i] += x.x[i] * x.x[i], kk[i] += y.x[i] * y.x[i], hk[i] += x.x[i] * u.x[i] * y.x[i];
  });
  const F n = F(most(p.D, 1)), eps = F(p.eps);
  const F rh = 1 / std::sqrt(sum<F>(hh[0] + hh[1]) / n + eps), rk = 1 / std::sqrt(sum<F>(kk[0] + kk[1]) / n + eps);
  const F score = sum<F>(hk[0] + hk[1]) * rh * rk / rows.root();
  *rows.number(rows.hidden_rstd, t, b) = rh, *rows.number(rows.key_rstd, t, b) = rk;
  return *rows.number(rows.score, t, b) = score;
}

template <class F, DType D>
void forward(const MemoryGate& p) {
  const Rows<F> rows(p);
  const TokenRows gated(p.gated, p.lead, 0, p.B);
  const int64_t bytes = p.D * kSize<D>;
  parallel(div_up(rows.tokens, rows.tile), 0, [&](int64_t task, char*) {
    const int64_t end = least(rows.tokens, (task + 1) * rows.tile);
    with_stores(is_non_temporal(p.gated.data, bytes, rows.tokens * p.B * bytes), [&](auto put) {
      for (int64_t t = task * rows.tile; t < end; ++t) {
        const char* v = rows.value.row(t);
        for (int64_t b = 0; b < p.B; ++b) {
          const Vec<F> a = fill<F>(sigmoid_of<F>(gate_of<F, D>(rows, t, b), p.signed_sqrt));
          char* out = gated.row(t * p.B + b);
          each_pair<F>(p.D, [&]<bool whole>(int64_t c, int64_t live) {
            const Pair<F> x = pair_at<F, D, whole>(v, c, live);
            put_pair<F, D, whole>({{a * x.x[0], a * x.x[1]}}, out, c, live, put);
          });
        }
      }
    });
  });
}

// Rows of a gradient, in dtype D, or in F where the argument is broadcast and the caller adds what it is broadcast to.
template <class F, DType D>
struct Target : TokenRows {
  using TokenRows::TokenRows;

  template <bool whole, class Put>
  MK_INLINE void put_at(char* row, const Pair<F>& v, int64_t c, int64_t live, Put put) const {
    if (kSize<D> == int(sizeof(F)) || dtype == D) put_pair<F, D, whole>(v, row, c, live, put);
    else put_pair<F, kOwn<F>, whole>(v, row, c, live, put);
  }
};

// The gradients of one token. `total` [B, width] collects G.
template <class F, DType D>
struct Backward {
  const MemoryGateBackward& b;
  const Rows<F>& rows;
  TokenRows d_gated;
  Target<F, D> d_hidden, d_key, d_value;

  Backward(const MemoryGateBackward& call, const Rows<F>& shared)
      : b(call),
        rows(shared),
        d_gated(b.d_gated, shared.p.lead, 0, shared.p.B),
        d_hidden(b.d_hidden, shared.p.lead, 0, shared.p.B),
        d_key(b.d_key, shared.p.lead, 0, shared.p.B),
        d_value(b.d_value, shared.p.lead, 0, 1) {}

  // <d_b, v>, and a d_b added to `dv`, or stored there for the first branch.
  F through_gate(const char* v, const char* d, F gate, bool first, F* dv) const {
    Vec<F> dot[2] = {fill<F>(0), fill<F>(0)};
    const Vec<F> a = fill<F>(gate);
    each_pair<F>(rows.p.D, [&]<bool whole>(int64_t c, int64_t live) {
      const Pair<F> x = pair_at<F, D, whole>(v, c, live), y = pair_at<F, D, whole>(d, c, live);
      Pair<F> z = {{a * y.x[0], a * y.x[1]}};
      for (int i = 0; i < 2; ++i) dot[i] += x.x[i] * y.x[i];
      if (!first) {
        const Pair<F> before = pair_of<F>(dv + c);
        for (int i = 0; i < 2; ++i) z.x[i] += before.x[i];
      }
      save<F>(dv + c, z);
    });
    return sum<F>(dot[0] + dot[1]);
  }

  template <class Put>
  void through_score(int64_t t, int64_t branch, F dg, F g, F* total, Put put) const {
    const MemoryGate& p = rows.p;
    const int64_t row = t * p.B + branch;
    const char *h = rows.hidden.row(row), *k = rows.key.row(row);
    char *dh = d_hidden ? d_hidden.row(row) : nullptr, *dk = d_key ? d_key.row(row) : nullptr;
    const F rh = *rows.number(rows.hidden_rstd, t, branch), rk = *rows.number(rows.key_rstd, t, branch);
    const F n = F(most(p.D, 1));
    const Vec<F> c1 = fill<F>(dg * rh * rk / rows.root());
    const Vec<F> less_h = fill<F>(dg * g * rh * rh / n), less_k = fill<F>(dg * g * rk * rk / n);
    const F* w = rows.w.data() + branch * rows.width;
    each_pair<F>(p.D, [&]<bool whole>(int64_t c, int64_t live) {
      const Pair<F> x = pair_at<F, D, whole>(h, c, live), y = pair_at<F, D, whole>(k, c, live), u = pair_of<F>(w + c);
      Pair<F> to_h, to_k, to_w;
      for (int i = 0; i < 2; ++i) {
        const Vec<F> cx = c1 * x.x[i], cw = c1 * u.x[i];
        to_h.x[i] = cw * y.x[i] - less_h * x.x[i];
        to_k.x[i] = cw * x.x[i] - less_k * y.x[i];
        to_w.x[i] = cx * y.x[i];
      }
      if (dh != nullptr) d_hidden.template put_at<whole>(dh, to_h, c, live, put);
      if (dk != nullptr) d_key.template put_at<whole>(dk, to_k, c, live, put);
      if (total == nullptr) return;
      const Pair<F> before = pair_of<F>(total + c);
      save<F>(total + c, {{before.x[0] + to_w.x[0], before.x[1] + to_w.x[1]}});
    });
  }

  template <class Put>
  void token(int64_t t, F* dv, F* total, Put put) const {
    const MemoryGate& p = rows.p;
    for (int64_t branch = 0; branch < p.B; ++branch) {
      const F g = *rows.number(rows.score, t, branch), a = sigmoid_of<F>(g, p.signed_sqrt);
      const F da = through_gate(rows.value.row(t), d_gated.row(t * p.B + branch), a, branch == 0, dv);
      if (!d_hidden && !d_key && total == nullptr) continue;
      F dg = da * a * (1 - a);
      if (p.signed_sqrt) dg = std::fabs(g) >= F(kLeast) ? dg * F(0.5) / std::sqrt(std::fabs(g)) : g == g ? dg * 0 : g;
      through_score(t, branch, dg, g, total == nullptr ? nullptr : total + branch * rows.width, put);
    }
    if (!d_value) return;
    char* out = d_value.row(t);
    each_pair<F>(p.D, [&]<bool whole>(int64_t c, int64_t live) {
      d_value.template put_at<whole>(out, pair_of<F>(dv + c), c, live, put);
    });
  }
};

// dw_h = w_k G and dw_k = w_h G from the sums of all chunks.
template <class F>
void weights_gradient(const MemoryGateBackward& b, const Rows<F>& rows, const F* sums, int64_t chunks) {
  const MemoryGate& p = rows.p;
  Buffer<F> total(rows.width), weight(rows.width);
  for (int64_t branch = 0; branch < p.B; ++branch) {
    for (int64_t c = 0; c < p.D; ++c) total.data()[c] = 0;
    for (int64_t i = 0; i < chunks; ++i) {
      const F* part = sums + (i * p.B + branch) * rows.width;
      for (int64_t c = 0; c < p.D; ++c) total.data()[c] += part[c];
    }
    const View* of[2] = {&p.key_weight, &p.hidden_weight};
    const View* to[2] = {&b.d_hidden_weight, &b.d_key_weight};
    for (int i = 0; i < 2; ++i) {
      if (!*to[i]) continue;
      read_row<F>(of[i]->data + branch * of[i]->row, of[i]->dtype, p.D, weight.data());
      F* out = reinterpret_cast<F*>(to[i]->data + branch * to[i]->row);
      for (int64_t c = 0; c < p.D; ++c) out[c] = weight.data()[c] * total.data()[c];
    }
  }
}

template <class F, DType D>
void backward(const MemoryGateBackward& b) {
  const MemoryGate& p = b.forward;
  const Rows<F> rows(p);
  const Backward<F, D> each(b, rows);
  const int64_t chunk = most(rows.tile, div_up(rows.tokens, kChunks)), chunks = div_up(rows.tokens, chunk);
  const bool weights = b.d_hidden_weight || b.d_key_weight;
  const int64_t numbers = p.B * rows.width;
  Buffer<F> sums(weights ? chunks * numbers : 0);
  Arena measure;
  measure.take<F>(rows.width);
  bool non_temporal = true;
  for (const View* out : {&b.d_hidden, &b.d_key, &b.d_value}) {
    const int64_t bytes = p.D * size_of(out->dtype);
    non_temporal = non_temporal && (!*out || is_non_temporal(out->data, bytes, rows.tokens * p.B * bytes));
  }
  parallel(chunks, measure.used(), [&](int64_t task, char* memory) {
    F* dv = Arena(memory).take<F>(rows.width);
    F* total = weights ? sums.data() + task * numbers : nullptr;
    for (int64_t i = 0; weights && i < numbers; ++i) total[i] = 0;
    const int64_t end = least(rows.tokens, (task + 1) * chunk);
    with_stores(non_temporal, [&](auto put) {
      for (int64_t t = task * chunk; t < end; ++t) each.token(t, dv, total, put);
    });
  });
  if (weights) weights_gradient<F>(b, rows, sums.data(), chunks);
}

}  // namespace

void memory_gate(const MemoryGate& p) {
  switch (p.hidden.dtype) {
    case DType::f64: return forward<double, DType::f64>(p);
    case DType::bf16: return forward<float, DType::bf16>(p);
    case DType::f16: return forward<float, DType::f16>(p);
    default: return forward<float, DType::f32>(p);
  }
}

void memory_gate_backward(const MemoryGateBackward& p) {
  switch (p.forward.hidden.dtype) {
    case DType::f64: return backward<double, DType::f64>(p);
    case DType::bf16: return backward<float, DType::bf16>(p);
    case DType::f16: return backward<float, DType::f16>(p);
    default: return backward<float, DType::f32>(p);
  }
}

}  // namespace mk::MK_ISA
