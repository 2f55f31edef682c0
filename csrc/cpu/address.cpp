// address:   w[t, i] = exp(s[t, i] - lse_t)  or  sigmoid(s[t, i])
// backward:  softmax: dS = w (dW - sum_j w_j dW_j);  sigmoid: dS = dW w (1 - w);  then dq, dK, dmask as for softmax_read
//
// The result is T x N numbers, each written once: the softmax takes lse from softmax_read and forms scores a second time rather
// than storing them twice (for 16-bit results that also keeps full precision). Every (tile of tokens, chunk of slots) is a task.
#include "params/address.h"

#include "cpu/tiles/score_gradients.h"

namespace mk::MK_ISA {
namespace {

// A tile of scores becomes weights, in place. For few tokens lanes are slots, S[token][slot]; else tokens, S[slot][token].
template <class F>
void open_gates(bool sigmoids, bool few, int64_t slots, int64_t n, int64_t L, const F* top, const F* rest, F* S) {
  constexpr int W = kLanes<F>;
  const int64_t rows = few ? n : slots, width = few ? round_up(slots, W) : L, stride = few ? kSlotBlock : L;
  for (int64_t l = 0; l < width; l += W) {
    Vec<F> lse = load<F>(top + (few ? 0 : l)), left = load<F>(rest + (few ? 0 : l)), keep;
    for (int64_t r = 0; r < rows; ++r) {
      F* s = S + r * stride + l;
      Vec<F> x = load<F>(s);
      if (few) lse = fill<F>(top[r]), left = fill<F>(rest[r]);
      if (sigmoids) sigmoid<F>(x, x, keep);
      else x = weight<F>(x, lse, left);
      store<F>(s, x);
    }
  }
}

template <class F>
void run(const Address& p) {
  constexpr int W = kLanes<F>;
  const GradientShape<F> s(p.lead, p.T, p.N, p.K, 0, false);
  const int64_t tiles = div_up(s.tokens, s.tile);
  Arena measure;
  Slots<F>::buffers(measure, kSlotBlock, p.K, 0);
  measure.take<F>(s.lanes * s.KP + (kSlotBlock + 2) * most(s.lanes, W) + kSlotBlock + W * s.KP);
  const size_t scratch = measure.used() + 8 * 64;

  parallel(s.batches * tiles * s.chunks, scratch, [&](int64_t task, char* memory) {
    FlushDenormals flush;
    Arena arena(memory);
    const int64_t chunk = task % s.chunks, tile = task / s.chunks % tiles, batch = task / s.chunks / tiles;
    const int64_t t0 = tile * s.tile, n = least(s.tile, s.tokens - t0), L = round_up(n, W);
    const Slots<F> slots(p.keys, View{}, p.mask, p.lead, batch, p.N, p.K, 0, s.few);
    const TokenRows query(p.query, p.lead, batch, p.T), lse(p.lse, p.lead, batch, p.T);
    const TokenRows lse_rest(p.lse_rest, p.lead, batch, p.T);
    const TokenRows weights(p.weights, p.lead, batch, p.T);
    const auto buffers = Slots<F>::buffers(arena, kSlotBlock, p.K, 0);
    F* q = arena.take<F>(s.lanes * s.KP);
    F* S = arena.take<F>(kSlotBlock * most(s.lanes, W));
    F* row = arena.take<F>(most(kSlotBlock, W * s.KP));
    F *top = arena.take<F>(most(s.lanes, W)), *rest = arena.take<F>(most(s.lanes, W));
    for (int64_t t = 0; t < most(s.lanes, W); ++t) {
      const bool reads = p.lse && t < n;
      const F l = reads ? *reinterpret_cast<const F*>(lse.row(t0 + t)) : F(0);
      top[t] = l == -kInf<F> ? kInf<F> : l;
      rest[t] = reads ? *reinterpret_cast<const F*>(lse_rest.row(t0 + t)) : F(0);
    }
    const F factor = F(p.scale);
    if (s.few) rows_query<F>(query, t0, n, p.K, factor, q);
    else pack_query<F>(query, t0, n, L, p.K, factor, row, q);

    for (int64_t i = s.begin(chunk); i < s.begin(chunk + 1); i += kSlotBlock) {
      const int64_t count = least(kSlotBlock, p.N - i);
      const SlotBlock<F> block = slots.load(i, count, buffers);
      if (s.few) score_rows<F>(block, p.K, q, n, S);
      else score_columns<F>(block, p.K, q, L, S);
      open_gates<F>(p.sigmoid, s.few, block.n, n, L, top, rest, S);
      for (int64_t t = 0; t < n; ++t) {
        for (int64_t j = 0; j < block.n; ++j) row[j] = s.few ? S[t * kSlotBlock + j] : S[j * L + t];
        if (block.which != nullptr) {  // backwards, so that no weight is overwritten before it has moved
          int64_t j = block.n;
          for (int64_t c = count; c-- > 0;) row[c] = j > 0 && block.which[j - 1] == c ? row[--j] : F(0);
        }
        write_row<F>(row, count, p.weights.dtype, weights.row(t0 + t) + i * size_of(p.weights.dtype));
      }
    }
  });
}

template <class F>
struct Kernel {
  const AddressBackward& p;
  const GradientShape<F>& s;

  // Packed tile: sum_j w_j dW_j [tile], queries as padded rows.
  size_t packed(const GradientShape<F>& g) const { return size_t(round_up(g.tile, 16) + g.tile * g.KP); }
  size_t scratch(const GradientShape<F>&) const { return 2 * kSlotBlock * sizeof(F); }
  const F* queries(const GradientShape<F>& g, const F* tile) const { return tile + round_up(g.tile, 16); }
  const F* reads(const GradientShape<F>&, const F*) const { return nullptr; }

  void pack(int64_t batch, int64_t t0, int64_t n, F* tile) const {
    const Address& f = p.forward;
    const TokenRows query(f.query, f.lead, batch, f.T);
    rows_query<F>(query, t0, n, f.K, F(1), const_cast<F*>(queries(s, tile)));
    F w[kSlotBlock], g[kSlotBlock];
    for (int64_t t = 0; t < n; ++t) {
      tile[t] = 0;
      for (int64_t i = 0; i < f.N && !f.sigmoid; i += kSlotBlock) {
        const int64_t count = least(kSlotBlock, f.N - i);
        fetch(batch, t0 + t, i, count, w, g);
        for (int64_t j = 0; j < count; ++j) tile[t] += w[j] * g[j];
      }
    }
  }

  void fetch(int64_t batch, int64_t t, int64_t first, int64_t count, F* w, F* g) const {
    const Address& f = p.forward;
    const TokenRows weights(f.weights, f.lead, batch, f.T), d(p.d_weights, f.lead, batch, f.T);
    read_row<F>(weights.row(t) + first * size_of(weights.dtype), weights.dtype, count, w);
    read_row<F>(d.row(t) + first * size_of(d.dtype), d.dtype, count, g);
  }

  void tile(int64_t batch, int64_t first, const SlotBlock<F>& block, int64_t t0, int64_t n, const F* tile, F*, F* D,
            TileStrides<F> at, Arena& arena) const {
    Arena own = arena;
    F* w = own.take<F>(kSlotBlock);
    F* g = own.take<F>(kSlotBlock);
    const int64_t count = block.n == 0 ? 0 : block.place(block.n - 1) + 1;
    for (int64_t t = 0; t < n; ++t) {
      fetch(batch, t0 + t, first, count, w, g);
      for (int64_t j = 0; j < block.n; ++j) {
        const int64_t i = block.place(j);
        D[t * at.ts + j] = p.forward.sigmoid ? g[i] * w[i] * (1 - w[i]) : w[i] * (g[i] - tile[t]);
      }
    }
  }
};

template <class F>
void run_backward(const AddressBackward& p) {
  const Address& f = p.forward;
  const GradientShape<F> s(f.lead, f.T, f.N, f.K, 0, true);
  score_gradients<F>(f.lead, f.keys, View{}, f.mask, f.scale, s, {p.d_query, p.d_keys, {}, p.d_mask, {}},
                     Kernel<F>{p, s});
}

}  // namespace

void address(const Address& p) {
  if (p.query.dtype == DType::f64) run<double>(p);
  else run<float>(p);
}

void address_backward(const AddressBackward& p) {
  if (p.forward.query.dtype == DType::f64) run_backward<double>(p);
  else run_backward<float>(p);
}

}  // namespace mk::MK_ISA
