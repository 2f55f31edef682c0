// softmax_read backward. With p = exp(s - lse), dP[t, i] = <dr_t, v_i>, delta_t = <dr_t, r_t> - dlse_t:
//
//   dS = p * (dP - delta),  dq = scale dS K,  dK = scale dS^T Q,  dV = P^T dR,  dmask_i = sum_t dS[t, i]
//
// Five products per tile, all in cache; score_gradients.h describes what runs in parallel and in which order it is
// summed. Scores are computed again instead of stored, and p = exp((s - lse) - lse_rest). With many tokens lanes are
// tokens for s and dP; with few, lanes are slots. With many bfloat16 tokens, on processors with products of pairs: s
// and dP are products of the given numbers, and P and dS are rounded before the other three products.
#include "cpu/tiles/score_gradients.h"
#include "params/softmax_read.h"

namespace mk::MK_ISA {
namespace {

template <class F>
struct Kernel {
  const SoftmaxReadBackward& p;
  const GradientShape<F>& s;

  // The rows of a tile, padded: in the tile, or where they lie in memory if they are padded there.
  struct Rows {
    const F *queries, *reads;
  };
  static constexpr int64_t kHead = 64 / int64_t(sizeof(F));
  static_assert(sizeof(Rows) <= 64);

  // Packed tile: Rows; lse, lse_rest and delta [lanes]; queries and d_reads as padded rows; for many tokens also as
  // lanes.
  size_t packed(const GradientShape<F>& g) const {
    return size_t(kHead + 3 * g.lanes + g.tile * 2 * (g.KP + g.VP) + (g.few ? 0 : g.lanes * (g.K + g.V)));
  }
  size_t scratch(const GradientShape<F>&) const { return 0; }
  static Rows rows(const F* tile) {
    Rows r;
    std::memcpy(&r, tile, sizeof r);
    return r;
  }
  const F* queries(const GradientShape<F>&, const F* tile) const { return rows(tile).queries; }
  const F* reads(const GradientShape<F>&, const F* tile) const { return rows(tile).reads; }
  // Queries times the scale: rows for few tokens, lanes for many; then d_reads as lanes.
  const F* scaled(const GradientShape<F>& g, const F* tile) const {
    return tile + kHead + 3 * g.lanes + g.tile * (g.KP + g.VP);
  }
  // n rows as the products take them, padded and in F: where they lie, or copied to `out`.
  static const F* padded(const TokenRows& from, int64_t t0, int64_t n, int64_t width, F* out) {
    const bool in_place = from.folds == 0 && from.dtype == kOwn<F> && from.stride == width * int64_t(sizeof(F)) &&
                          width == Slots<F>::padded(width);
    if (in_place) return reinterpret_cast<const F*>(from.row(t0));
    rows_query<F>(from, t0, n, width, F(1), out);
    return out;
  }
  // <a, b> of padded rows, b and `width` numbers of a.
  static F dot(const F* a, const F* b, int64_t width) {
    Vec<F> total = fill<F>(0);
    int64_t c = 0;
    for (; c + kLanes<F> <= width; c += kLanes<F>) total += load<F>(a + c) * load<F>(b + c);
    F x = sum<F>(total);
    for (; c < width; ++c) x += a[c] * b[c];
    return x;
  }

  void pack(int64_t batch, int64_t t0, int64_t n, F* tile) const {
    const SoftmaxRead& f = p.forward;
    const TokenRows query(f.query, f.lead, batch, f.T), read(f.read, f.lead, batch, f.T),
        lse(f.lse, f.lead, batch, f.T), lse_rest(f.lse_rest, f.lead, batch, f.T);
    const TokenRows d_read(p.d_read, f.lead, batch, f.T), d_lse(p.d_lse, f.lead, batch, f.T);
    F *top = tile + kHead, *rest = top + s.lanes, *delta = rest + s.lanes;
    F *q_rows = delta + s.lanes, *dr_rows = q_rows + s.tile * s.KP;
    F* sq = const_cast<F*>(scaled(s, tile));
    const F factor = F(f.scale);
    const F* dr = padded(d_read, t0, n, f.V, dr_rows);
    const F* q = s.pairs ? q_rows : padded(query, t0, n, f.K, q_rows);
    const Rows both{q, dr};
    std::memcpy(tile, &both, sizeof both);
    for (int64_t t = 0; t < s.lanes; ++t) {
      top[t] = kInf<F>;  // a token that reads nothing, and a lane without a token: p = exp(s - inf) = 0
      rest[t] = delta[t] = 0;
      if (t >= n) continue;
      const F l = *reinterpret_cast<const F*>(lse.row(t0 + t));
      if (l != -kInf<F>) top[t] = l, rest[t] = *reinterpret_cast<const F*>(lse_rest.row(t0 + t));
      if (read) {
        const F* r = row_as<F>(read.row(t0 + t), read.dtype, f.V, sq);  // scratch: `sq` is packed later
        delta[t] = dot(r, dr + t * s.VP, f.V);
      }
      if (d_lse) delta[t] -= *reinterpret_cast<const F*>(d_lse.row(t0 + t));
    }
    if (s.few) {
      for (int64_t x = 0; x < n * s.KP; ++x) sq[x] = factor * q[x];
      return;
    }
    const int64_t L = round_up(n, kLanes<F>);
    if constexpr (kHasPairs<F>) {
      if (s.pairs) {
        pair_rows(n, f.K, s.KP, q_rows, [&](int64_t t) { return query.row(t0 + t); });
        pair_rows(n, f.V, s.VP, dr_rows, [&](int64_t t) { return d_read.row(t0 + t); });
        const auto bits = [](const char* row) { return reinterpret_cast<const F*>(row); };
        pack_lanes<F, true>(n, L, f.K / 2, 1, nullptr, sq, [&](int64_t t, F*) { return bits(query.row(t0 + t)); });
        pack_lanes<F, true>(n, L, f.V / 2, 1, nullptr, sq + s.lanes * f.K,
                            [&](int64_t t, F*) { return bits(d_read.row(t0 + t)); });
        return;
      }
    }
    pack_lanes<F>(n, L, f.K, factor, nullptr, sq, [&](int64_t t, F*) { return q + t * s.KP; });
    pack_lanes<F>(n, L, f.V, F(1), nullptr, sq + s.lanes * f.K, [&](int64_t t, F*) { return dr + t * s.VP; });
  }

  void tile(int64_t, int64_t, const SlotBlock<F>& block, int64_t, int64_t n, const F* tile, F* P, F* D, TileStrides<F>,
            Arena&) const {
    constexpr int W = kLanes<F>;
    const F *lse = tile + kHead, *rest = lse + s.lanes, *delta = rest + s.lanes;
    if (s.few) {
      score_rows<F>(block, s.K, scaled(s, tile), n, P);
      dot_rows<F>(block.n, block.values, block.vs, s.V, reads(s, tile), n, F(0), D, kSlotBlock, block.values_ahead);
      for (int64_t t = 0; t < n; ++t) {
        const Vec<F> l = fill<F>(lse[t]), r = fill<F>(rest[t]), d = fill<F>(delta[t]);
        for (int64_t j = t * kSlotBlock; j < t * kSlotBlock + round_up(block.n, W); j += W) {
          const Vec<F> e = weight<F>(load<F>(P + j), l, r);
          store<F>(P + j, e);
          store<F>(D + j, e * (load<F>(D + j) - d));
        }
      }
      return;
    }
    const int64_t L = round_up(n, W);
    const F *q = scaled(s, tile), *dr = q + s.lanes * s.K;
    if constexpr (kHasPairs<F>) {
      if (s.pairs) {
        gemm_pairs({block.n, L, s.K / 2, block.keys, block.ks, 1, q, L, P, L, false}, F(p.forward.scale));
        add_mask(block, L, P);
        gemm_pairs({block.n, L, s.V / 2, block.values, block.vs, 1, dr, L, D, L, false}, 1);
      }
    }
    if (!s.pairs) {
      score_columns<F>(block, s.K, q, L, P);
      gemm(Gemm<F>{block.n, L, s.V, block.values, block.vs, 1, dr, L, D, L, false});
    }
    for (int64_t l = 0; l < L; l += W) {
      const Vec<F> top = load<F>(lse + l), r = load<F>(rest + l), d = load<F>(delta + l);
      for (int64_t j = l; j < block.n * L; j += L) {
        const Vec<F> e = weight<F>(load<F>(P + j), top, r);
        store<F>(P + j, e);
        store<F>(D + j, e * (load<F>(D + j) - d));
      }
    }
  }
};

template <class F>
void run(const SoftmaxReadBackward& p) {
  const SoftmaxRead& f = p.forward;
  GradientShape<F> s(f.lead, f.T, f.N, f.K, f.V, false);
  s.pairs = !s.few && are_pairs<F>(f.query.dtype, f.keys, f.K) && f.values.dtype == DType::bf16 &&
            p.d_read.dtype == DType::bf16 && f.V > 0 && f.V % 2 == 0;
  score_gradients<F>(f.lead, f.keys, f.values, f.mask, f.range, f.scale, s,
                     {p.d_query, p.d_keys, p.d_values, p.d_mask, {}}, Kernel<F>{p, s});
}

}  // namespace

void softmax_read_backward(const SoftmaxReadBackward& p) {
  if (p.forward.query.dtype == DType::f64) run<double>(p);
  else run<float>(p);
}

}  // namespace mk::MK_ISA
