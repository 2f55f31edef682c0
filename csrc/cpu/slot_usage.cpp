// slot_usage:  usage_i = sum_t p[t, i],  p[t, i] = exp(s[t, i] - lse_t)
// backward:    dS = p * g_i,  dq = scale dS K,  dK = scale dS^T Q,  dmask_i = sum_t dS[t, i],  dlse_t = -sum_i dS[t, i]
//
// The column sums of a matrix that is never stored. Both directions use the score tiles of score_gradients.h, which sum
// in a fixed order: the forward is the gradient of a mask with dS = p.
#include "params/slot_usage.h"

#include "cpu/tiles/score_gradients.h"

namespace mk::MK_ISA {
namespace {

template <class F>
struct Kernel {
  const SlotUsage& p;
  const View& d_usage;  // missing in the forward
  const GradientShape<F>& s;

  // Packed tile: lse [lanes], queries as padded rows, and scaled as rows (few tokens) or lanes.
  size_t packed(const GradientShape<F>& g) const {
    return size_t(g.lanes + g.tile * 2 * g.KP + (g.few ? 0 : g.lanes * g.K));
  }
  size_t scratch(const GradientShape<F>&) const { return kSlotBlock * sizeof(F); }
  const F* queries(const GradientShape<F>& g, const F* tile) const { return tile + g.lanes; }
  const F* reads(const GradientShape<F>&, const F*) const { return nullptr; }
  const F* scaled(const F* tile) const { return tile + s.lanes + s.tile * s.KP; }

  void pack(int64_t batch, int64_t t0, int64_t n, F* tile) const {
    const TokenRows query(p.query, p.lead, batch, p.T), lse(p.lse, p.lead, batch, p.T);
    const F factor = F(p.scale);
    F* q = const_cast<F*>(queries(s, tile));
    F* sq = const_cast<F*>(scaled(tile));
    rows_query<F>(query, t0, n, p.K, F(1), q);
    for (int64_t t = 0; t < s.lanes; ++t) {
      const F l = t < n ? *reinterpret_cast<const F*>(lse.row(t0 + t)) : -kInf<F>;
      tile[t] = l == -kInf<F> ? kInf<F> : l;  // exp(s - inf) = 0: this token reads nothing
    }
    if (s.few) {
      for (int64_t x = 0; x < n * s.KP; ++x) sq[x] = factor * q[x];
    } else {
      pack_lanes<F>(n, round_up(n, kLanes<F>), p.K, factor, nullptr, sq, [&](int64_t t, F*) { return q + t * s.KP; });
    }
  }

  void tile(int64_t batch, int64_t first, const SlotBlock<F>& block, int64_t, int64_t n, const F* tile, F*, F* D,
            TileStrides<F> at, Arena& arena) const {
    constexpr int W = kLanes<F>;
    Arena own = arena;
    F* g = own.take<F>(kSlotBlock);
    const char* d = d_usage ? d_usage.batch(p.lead, batch) + first * d_usage.row : nullptr;
    for (int64_t j = 0; j < kSlotBlock; ++j) {
      g[j] = j >= block.n ? F(0) : d == nullptr ? F(1) : *reinterpret_cast<const F*>(d + block.place(j) * d_usage.row);
    }
    if (s.few) {
      score_rows<F>(block, p.K, scaled(tile), n, D);
      for (int64_t t = 0; t < n; ++t) {
        for (int64_t j = 0; j < round_up(block.n, W); j += W) {
          F* x = D + t * at.ts + j;
          store<F>(x, exp<F>(load<F>(x) - fill<F>(tile[t])) * load<F>(g + j));
        }
      }
      return;
    }
    score_columns<F>(block, p.K, scaled(tile), at.is, D);
    for (int64_t j = 0; j < block.n; ++j) {
      for (int64_t l = 0; l < at.is; l += W) {
        F* x = D + j * at.is + l;
        store<F>(x, exp<F>(load<F>(x) - load<F>(tile + l)) * g[j]);
      }
    }
  }
};

template <class F>
void run(const SlotUsage& p, const View& d_usage, const GradientViews& out) {
  const GradientShape<F> s(p.lead, p.T, p.N, p.K, 0, false);
  score_gradients<F>(p.lead, p.keys, View{}, p.mask, p.range, p.scale, s, out, Kernel<F>{p, d_usage, s});
}

}  // namespace

void slot_usage(const SlotUsage& p) {
  const GradientViews out{{}, {}, {}, p.usage, {}};
  if (p.query.dtype == DType::f64) run<double>(p, View{}, out);
  else run<float>(p, View{}, out);
}

void slot_usage_backward(const SlotUsageBackward& p) {
  const GradientViews out{p.d_query, p.d_keys, {}, p.d_mask, p.d_lse};
  if (p.forward.query.dtype == DType::f64) run<double>(p.forward, p.d_usage, out);
  else run<float>(p.forward, p.d_usage, out);
}

}  // namespace mk::MK_ISA
