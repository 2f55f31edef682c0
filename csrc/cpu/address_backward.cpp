// The gradient of address:  dS = w (dW - sum_j w_j dW_j) for softmax, dW w (1 - w) for sigmoid;  dq, dK, dmask as for
// softmax_read (cpu/tiles/score_gradients.h). Both come from the weights themselves, so no score is computed again.
// Lanes are slots, as the weights lie in memory; for products of pairs of bfloat16, dS is transposed and rounded.
#include <algorithm>
#include <utility>

#include "cpu/tiles/score_gradients.h"
#include "params/address.h"

namespace mk::MK_ISA {
namespace {

template <class F>
struct Kernel {
  const AddressBackward& p;
  const GradientShape<F>& s;

  // Packed tile: sum_j w_j dW_j [tile], queries as padded rows, or pairs of them.
  size_t packed(const GradientShape<F>& g) const { return size_t(round_up(g.tile, 16) + g.tile * g.KP); }
  size_t scratch(const GradientShape<F>& g) const { return (2 + (g.pairs ? W : 0)) * kSlotBlock * sizeof(F); }
  const F* queries(const GradientShape<F>& g, const F* tile) const { return tile + round_up(g.tile, 16); }
  const F* reads(const GradientShape<F>&, const F*) const { return nullptr; }

  void pack(int64_t batch, int64_t t0, int64_t n, F* tile) const {
    const Address& f = p.forward;
    const TokenRows query(f.query, f.lead, batch, f.T);
    F* q = const_cast<F*>(queries(s, tile));
    if constexpr (kHasPairs<F>) {
      if (s.pairs) pair_rows(n, f.K, s.KP, q, [&](int64_t t) { return query.row(t0 + t); });
    }
    if (!s.pairs) rows_query<F>(query, t0, n, f.K, F(1), q);
    const Rows rows(p, batch);
    F w[kSlotBlock], g[kSlotBlock];
    for (int64_t t = 0; t < n; ++t) {
      Vec<F> sums[2] = {fill<F>(0), fill<F>(0)};
      F rest = 0;
      Span own{0, f.N};
      const TileSpans spans(f.range, f.lead, batch, f.T, f.N, t0 + t, 1, &own);
      for (int64_t i = own.first; i < own.stop && !f.sigmoid; i += kSlotBlock) {
        const int64_t count = least(kSlotBlock, own.stop - i);
        const auto [a, b] = rows.of(t0 + t, i, count, w, g);
        int64_t j = 0;
        for (; j + 2 * W <= count; j += 2 * W) {
          sums[0] += load<F>(a + j) * load<F>(b + j);
          sums[1] += load<F>(a + j + W) * load<F>(b + j + W);
        }
        for (; j < count; ++j) rest += a[j] * b[j];
      }
      tile[t] = sum<F>(sums[0] + sums[1]) + rest;
    }
  }

  void tile(int64_t batch, int64_t first, const SlotBlock<F>& block, int64_t t0, int64_t n, const F* tile, F*, F* D,
            TileStrides<F> at, Arena& arena) const {
    Arena own = arena;
    F* w = own.take<F>(kSlotBlock);
    F* g = own.take<F>(kSlotBlock);
    const Rows rows(p, batch);
    const int64_t count = block.n == 0 ? 0 : block.place(block.n - 1) + 1;
    const auto open = [&](int64_t t, F* d) {
      const auto [a, b] = rows.of(t0 + t, first, count, w, g);
      const Vec<F> mean = fill<F>(tile[t]);
      int64_t j = 0;
      for (; block.which == nullptr && j + W <= count; j += W) {
        const Vec<F> x = load<F>(a + j), y = load<F>(b + j);
        store<F>(d + j, p.forward.sigmoid ? y * x * (1 - x) : x * (y - mean));
      }
      for (; j < block.n; ++j) {
        const int64_t i = block.place(j);
        d[j] = p.forward.sigmoid ? b[i] * a[i] * (1 - a[i]) : a[i] * (b[i] - tile[t]);
      }
    };
    for (int64_t t = 0; !s.pairs && t < n; ++t) open(t, D + t * at.ts);
    if (!s.pairs) return;
    F* d = own.take<F>(W * kSlotBlock);
    for (int64_t l = 0; l < n; l += W) {
      for (int64_t i = 0; i < W; ++i) {
        if (l + i < n) open(l + i, d + i * kSlotBlock);
        else std::fill_n(d + i * kSlotBlock, block.n, F(0));  // a lane without a token
      }
      for (int64_t c = 0; c < block.n; c += W) {
        Vec<F> x[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) x[i] = load<F>(d + i * kSlotBlock + c);
        transpose<F>(x);
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) store<F>(D + (c + j) * at.is + l, x[j]);  // D has whole registers of slots
      }
    }
  }

 private:
  static constexpr int W = kLanes<F>;

  // Rows of the weights and of their gradients.
  struct Rows {
    TokenRows weights, d_weights;
    Rows(const AddressBackward& p, int64_t batch)
        : weights(p.forward.weights, p.forward.lead, batch, p.forward.T),
          d_weights(p.d_weights, p.forward.lead, batch, p.forward.T) {}
    // Those of token t and `count` slots, where they lie if they have the type F, else in `w` and `g`.
    std::pair<const F*, const F*> of(int64_t t, int64_t first, int64_t count, F* w, F* g) const {
      return {row_as<F>(weights.row(t) + first * size_of(weights.dtype), weights.dtype, count, w),
              row_as<F>(d_weights.row(t) + first * size_of(d_weights.dtype), d_weights.dtype, count, g)};
    }
  };
};

template <class F>
void run_backward(const AddressBackward& p) {
  const Address& f = p.forward;
  const bool pairs = !few_tokens<F>(f.lead.folded() * f.T) && are_pairs<F>(f.query.dtype, f.keys, f.K);
  GradientShape<F> s(f.lead, f.T, f.N, f.K, 0, !pairs);
  s.pairs = pairs;
  score_gradients<F>(f.lead, f.keys, View{}, f.mask, f.range, f.scale, s, {p.d_query, p.d_keys, {}, p.d_mask, {}},
                     Kernel<F>{p, s});
}

}  // namespace

void address_backward(const AddressBackward& p) {
  if (p.forward.query.dtype == DType::f64) run_backward<double>(p);
  else run_backward<float>(p);
}

}  // namespace mk::MK_ISA
