// additive_read backward. With p = exp(s - lse), dP[t, i] = <dr_t, v_i>, delta_t = <dr_t, r_t> - dlse_t and
// h = tanh(q_ta + k_ia):
//
//   ds = p * (dP - delta),  dh = ds u (1 - h^2),  dq_ta = sum_i dh,  dk_ia = sum_t dh,  du_a = sum_ti ds h,
//   dv = P^T dR,  dmask_i = sum_t ds
//
// Each h is computed once. For one token and a block of slots it stays in cache ([96, K]) until ds is known. Lanes run
// along K, so only the score needs a sum over lanes.
//
// The tasks are chunks of slots. Each owns its rows of dk, dv and dmask and writes a partial dq and du. The partial
// results are then added in the order of the chunks. Tokens are taken in panels, so that partial results stay within
// kPartialBytes. With many batches, batches run in parallel instead, unless they share memory. The gradient of u is
// kept per batch and summed at the end.
//
// delta comes from the read if the read is exact. A read rounded to 16 bits is not good enough: u (1 - h^2) has one
// sign, unlike keys, so an error of delta does not average out in dq. Then a first pass over the scores computes
// delta_t = sum_i p dP - dlse_t.
//
// Tokens with ranges (cpu/tiles/ranges.h): a token has hidden units and gradients for its own slots alone. In a border
// block dv is summed token by token.
#include "cpu/tiles/additive_scores.h"
#include "cpu/tiles/score_gradients.h"
#include "params/additive_read.h"

namespace mk::MK_ISA {
namespace {

// One panel of tokens: queries and d_reads as padded rows, lse with its rest, delta.
template <class F>
struct Panel {
  F *q, *dr, *lse, *rest, *delta;
  Span* spans;

  Panel(Arena& arena, const GradientShape<F>& s, bool ranges)
      : q(arena.take<F>(s.panel * s.KP)),
        dr(arena.take<F>(s.panel * s.VP)),
        lse(arena.take<F>(s.panel)),
        rest(arena.take<F>(s.panel)),
        delta(arena.take<F>(s.panel)),
        spans(arena.take<Span>(ranges ? s.panel : 0)) {}

  // Was the read stored without rounding?
  static bool exact(const AdditiveReadBackward& p) { return p.forward.read.dtype == kOwn<F>; }

  // Packs tokens [first, end) of the panel that begins at token t0.
  void pack(const AdditiveReadBackward& p, const GradientShape<F>& s, int64_t batch, int64_t t0, int64_t first,
            int64_t end, F* row) const {
    const AdditiveRead& f = p.forward;
    const TokenRows query(f.query, f.lead, batch, f.T), read(f.read, f.lead, batch, f.T),
        lses(f.lse, f.lead, batch, f.T), rests(f.lse_rest, f.lead, batch, f.T);
    const TokenRows d_read(p.d_read, f.lead, batch, f.T), d_lse(p.d_lse, f.lead, batch, f.T);
    rows_query<F>(query, t0 + first, end - first, f.K, F(1), q + first * s.KP);
    rows_query<F>(d_read, t0 + first, end - first, f.V, F(1), dr + first * s.VP);
    for (int64_t t = first; t < end; ++t) {
      const F l = *reinterpret_cast<const F*>(lses.row(t0 + t));
      lse[t] = l == -kInf<F> ? kInf<F> : l;  // a token that reads nothing: p = exp(s - inf) = 0
      rest[t] = *reinterpret_cast<const F*>(rests.row(t0 + t));
      delta[t] = d_lse ? -*reinterpret_cast<const F*>(d_lse.row(t0 + t)) : F(0);
      if (!exact(p)) continue;
      read_row<F>(read.row(t0 + t), read.dtype, f.V, row);
      for (int64_t v = 0; v < f.V; ++v) delta[t] += row[v] * dr[t * s.VP + v];
    }
  }
};

// The working memory of a chunk of slots, and its partial sums: dq of the panel, du.
template <class F>
struct Chunk {
  F *P, *D, *hidden, *dk, *dv, *dm;
  typename Slots<F>::Buffers buffers;

  Chunk(Arena& arena, const GradientShape<F>& s)
      : P(arena.take<F>(s.tile * kSlotBlock + kLanes<F>)),
        D(arena.take<F>(s.tile * kSlotBlock)),
        hidden(arena.take<F>(kSlotBlock * s.KP)),
        dk(arena.take<F>(kSlotBlock * s.KP)),
        dv(arena.take<F>(kSlotBlock * s.VP)),
        dm(arena.take<F>(kSlotBlock)),
        buffers(Slots<F>::buffers(arena, kSlotBlock, s.K, s.V)) {}
};

// Adds dh of one token and n slots to the three sums, for some registers of columns.
template <class F, int columns>
MK_INLINE void add_columns(const F* ds, const F* hidden, const F* u, int64_t n, int64_t KP, F* dk, F* dq, F* du) {
  constexpr int W = kLanes<F>;
  Vec<F> uv[columns], q[columns], sum[columns];
  for (int i = 0; i < columns; ++i) {
    uv[i] = load<F>(u + i * W), q[i] = load<F>(dq + i * W), sum[i] = load<F>(du + i * W);
  }
  for (int64_t r = 0; r < n; ++r, hidden += KP, dk += KP) {
    const Vec<F> d = fill<F>(ds[r]);
#pragma GCC unroll 4
    for (int i = 0; i < columns; ++i) {
      const Vec<F> h = load<F>(hidden + i * W), dh = d * h;
      const Vec<F> g = uv[i] * (d - dh * h);
      store<F>(dk + i * W, load<F>(dk + i * W) + g);
      q[i] += g;
      sum[i] += dh;
    }
  }
  for (int i = 0; i < columns; ++i) store<F>(dq + i * W, q[i]), store<F>(du + i * W, sum[i]);
}

template <class F>
void add_hidden(const F* ds, const F* hidden, const F* u, int64_t n, int64_t KP, F* dk, F* dq, F* du) {
  constexpr int W = kLanes<F>;
  int64_t c = 0;
  for (; c + 4 * W <= KP; c += 4 * W) add_columns<F, 4>(ds, hidden + c, u + c, n, KP, dk + c, dq + c, du + c);
  for (; c < KP; c += W) add_columns<F, 1>(ds, hidden + c, u + c, n, KP, dk + c, dq + c, du + c);
}

// The gradients of one batch. d_vector [KP]: of u.
template <class F>
class Batch {
 public:
  Batch(const AdditiveReadBackward& p, const GradientShape<F>& s, int64_t batch, F* d_vector, char* memory)
      : Batch(p, s, batch, d_vector, Arena(memory)) {}
  static size_t bytes(const GradientShape<F>& s, bool ranges) {
    Arena measure;
    Panel<F>(measure, s, ranges);
    measure.take<TileSpans>(ranges ? s.panel / s.tile : 0);
    measure.take<F>(2 * s.KP + s.chunks * (s.panel * s.KP + s.KP + s.panel));
    return measure.used() + 5 * 64;
  }

  void run() const {
    padded_row<F>(f_.vector.batch(f_.lead, batch_), f_.vector.dtype, s_.K, u_);
    std::memset(d_vector_, 0, size_t(s_.KP) * sizeof(F));
    Arena measure;
    Chunk<F>(measure, s_);
    for (int64_t p0 = 0; p0 < s_.tokens; p0 += s_.panel) {
      const int64_t pn = least(s_.panel, s_.tokens - p0);
      parallel(div_up(pn, s_.tile), size_t(s_.VP) * sizeof(F), [&](int64_t x, char* row) {
        const int64_t first = x * s_.tile, end = least(pn, first + s_.tile);
        tokens_.pack(p_, s_, batch_, p0, first, end, reinterpret_cast<F*>(row));
        if (f_.range) {
          tiles_[x] = TileSpans(f_.range, f_.lead, batch_, f_.T, f_.N, p0 + first, end - first, tokens_.spans + first);
        }
      });
      if (!tokens_.exact(p_)) sum_deltas(pn, measure.used());
      parallel(s_.chunks, measure.used(), [&](int64_t c, char* own) {
        FlushDenormals flush;
        add_chunk(c, p0, pn, Arena(own));
      });
      for (int64_t c = 0; c < s_.chunks; ++c) {
        for (int64_t a = 0; a < s_.KP; ++a) d_vector_[a] += dus_[c * s_.KP + a];
      }
      if (p_.d_query) store_queries(p0, pn);
    }
  }

 private:
  Batch(const AdditiveReadBackward& p, const GradientShape<F>& s, int64_t batch, F* d_vector, Arena arena)
      : p_(p),
        f_(p.forward),
        s_(s),
        batch_(batch),
        tokens_(arena, s, bool(p.forward.range)),
        tiles_(arena.take<TileSpans>(p.forward.range ? s.panel / s.tile : 0)),
        slots_(f_.keys, f_.values, f_.mask, f_.lead, batch, f_.N, s.K, s.V, true),
        through_(p.d_query || p.d_keys || p.d_vector),
        first_keys_(p.d_keys && first_visit(p.d_keys, f_.lead, batch)),
        first_values_(p.d_values && first_visit(p.d_values, f_.lead, batch)),
        first_mask_(p.d_mask && first_visit(p.d_mask, f_.lead, batch)),
        d_vector_(d_vector),
        u_(arena.take<F>(s.KP)),
        dqs_(arena.take<F>(s.chunks * s.panel * s.KP)),
        dus_(arena.take<F>(s.chunks * s.KP)),
        deltas_(arena.take<F>(s.chunks * s.panel)) {}

  // Calls body(first, count, block) for the blocks of a chunk of slots; without rows where no token may address one.
  template <class Body>
  MK_INLINE void each_block(int64_t c, int64_t pn, const Chunk<F>& w, Body&& body) const {
    const int64_t hi = s_.begin(c + 1);
    for (int64_t i = s_.begin(c); i < hi; i += kSlotBlock) {
      const int64_t count = least(kSlotBlock, hi - i);
      SlotBlock<F> block;
      const auto meets = [&](const TileSpans& spans) { return spans.meet(i, i + count); };
      if (!f_.range || std::any_of(tiles_, tiles_ + div_up(pn, s_.tile), meets)) {
        block = slots_.load(i, count, w.buffers);
      }
      body(i, count, block);
    }
  }

  // Tile x / s.tile of the panel and a block of slots from `first` on.
  bool meet(int64_t x, int64_t first, int64_t count) const {
    return !f_.range || tiles_[x / s_.tile].meet(first, first + count);
  }
  // The rows of the block that token t of the panel may address.
  RowSpan rows_of(const SlotBlock<F>& block, int64_t first, int64_t t) const {
    return f_.range ? rows_within(block, first, tokens_.spans[t]) : RowSpan{0, block.n};
  }

  // ps [block] = p of token t of the panel and a block of slots, 0 beyond rows `r`; hidden [block, KP], if given: h.
  MK_INLINE void weigh(const SlotBlock<F>& block, int64_t first, RowSpan r, int64_t t, F* ps, F* hidden) const {
    additive_part<F>(block, first, r, s_.K, tokens_.q + t * s_.KP, u_, ps, hidden);
    const Vec<F> lse = fill<F>(tokens_.lse[t]), rest = fill<F>(tokens_.rest[t]);
    for (int64_t j = 0; j < block.n; j += kLanes<F>) store<F>(ps + j, weight<F>(load<F>(ps + j), lse, rest));
    std::fill(ps, ps + r.first, F(0));  // of a token whose lse is NaN, too
    std::fill(ps + r.stop, ps + most(r.stop, block.n), F(0));
  }

  // D [n, block] = dP of n tokens from x on.
  MK_INLINE void multiply(const SlotBlock<F>& block, int64_t x, int64_t n, F* D) const {
    dot_rows<F>(block.n, block.values, block.vs, s_.V, tokens_.dr + x * s_.VP, n, F(0), D, kSlotBlock);
  }

  // delta += sum_i p dP of the pn tokens of a panel.
  void sum_deltas(int64_t pn, size_t bytes) const {
    constexpr int W = kLanes<F>;
    parallel(s_.chunks, bytes, [&](int64_t c, char* own) {
      FlushDenormals flush;
      Arena arena(own);
      const Chunk<F> w(arena, s_);
      F* delta = deltas_ + c * s_.panel;
      std::memset(delta, 0, size_t(pn) * sizeof(F));
      each_block(c, pn, w, [&](int64_t first, int64_t count, const SlotBlock<F>& block) {
        for (int64_t x = 0; x < pn && block.n > 0; x += s_.tile) {
          if (!meet(x, first, count)) continue;
          const int64_t n = least(s_.tile, pn - x);
          multiply(block, x, n, w.D);
          for (int64_t t = 0; t < n; ++t) {
            const RowSpan r = rows_of(block, first, x + t);
            weigh(block, first, r, x + t, w.P, nullptr);
            F* dp = w.D + t * kSlotBlock;
            std::fill(dp, dp + r.first, F(0));
            std::fill(dp + r.stop, dp + most(r.stop, block.n), F(0));
            Vec<F> acc = fill<F>(0);
            for (int64_t j = 0; j < block.n; j += W) acc += load<F>(w.P + j) * load<F>(dp + j);
            delta[x + t] += sum<F>(acc);
          }
        }
      });
    });
    for (int64_t c = 0; c < s_.chunks; ++c) {
      for (int64_t t = 0; t < pn; ++t) tokens_.delta[t] += deltas_[c * s_.panel + t];
    }
  }

  // The gradients of a chunk of slots, summed over tokens [p0, p0 + pn), and its partial dq and du.
  void add_chunk(int64_t c, int64_t p0, int64_t pn, Arena arena) const {
    const Chunk<F> w(arena, s_);
    F *dq = dqs_ + c * s_.panel * s_.KP, *du = dus_ + c * s_.KP;
    std::memset(dq, 0, size_t(pn * s_.KP) * sizeof(F));
    std::memset(du, 0, size_t(s_.KP) * sizeof(F));
    each_block(c, pn, w, [&](int64_t i, int64_t count, const SlotBlock<F>& block) {
      std::memset(w.dk, 0, size_t(kSlotBlock * s_.KP) * sizeof(F));
      std::memset(w.dm, 0, size_t(kSlotBlock) * sizeof(F));
      if (f_.range) std::memset(w.dv, 0, size_t(kSlotBlock * s_.VP) * sizeof(F));
      for (int64_t x = 0; x < pn && block.n > 0; x += s_.tile) {
        if (meet(x, i, count)) add_tile(block, i, x, least(s_.tile, pn - x), w, dq + x * s_.KP, du);
      }
      auto scatter = [&](const View& view, bool first, const F* rows, int64_t ld, int64_t width) {
        if (view) scatter_rows<F>(view, f_.lead, batch_, p0 == 0 && first, i, count, block, rows, ld, width, F(1));
      };
      scatter(p_.d_keys, first_keys_, w.dk, s_.KP, s_.K);
      scatter(p_.d_values, first_values_, w.dv, s_.VP, s_.V);
      scatter(p_.d_mask, first_mask_, w.dm, 1, 1);
    });
  }

  // A block of slots and n tokens of the panel, from x on: adds to dk, dv and dm of the block, to dq [n, KP] and du.
  void add_tile(const SlotBlock<F>& block, int64_t first, int64_t x, int64_t n, const Chunk<F>& w, F* dq, F* du) const {
    constexpr int W = kLanes<F>;
    multiply(block, x, n, w.D);
    for (int64_t t = 0; t < n; ++t) {
      F *ps = w.P + t * kSlotBlock, *ds = w.D + t * kSlotBlock;
      const RowSpan r = rows_of(block, first, x + t);
      weigh(block, first, r, x + t, ps, w.hidden);
      const Vec<F> delta = fill<F>(tokens_.delta[x + t]);
      for (int64_t j = 0; j < block.n; j += W) store<F>(ds + j, load<F>(ps + j) * (load<F>(ds + j) - delta));
      std::fill(ds, ds + r.first, F(0));  // where dP is NaN, too
      std::fill(ds + r.stop, ds + most(r.stop, block.n), F(0));
      if (!through_ || r.count() <= 0) continue;
      add_hidden<F>(ds + r.first, w.hidden + r.first * s_.KP, u_, r.count(), s_.KP, w.dk + r.first * s_.KP,
                    dq + t * s_.KP, du);
    }
    const TileStrides<F> at{kSlotBlock, 1};
    const bool whole = block.n == 0 || !f_.range ||
                       tiles_[x / s_.tile].hold(first + block.place(0), first + block.place(block.n - 1) + 1);
    for (int64_t t = 0; t < n && p_.d_values && !whole; ++t) {
      const RowSpan r = rows_of(block, first, x + t);
      if (r.count() <= 0) continue;
      gemm(Gemm<F>{r.count(), s_.VP, 1, w.P + t * kSlotBlock + r.first, 1, kSlotBlock, tokens_.dr + (x + t) * s_.VP,
                   s_.VP, w.dv + r.first * s_.VP, s_.VP, true});
    }
    if (p_.d_values && whole) {
      gemm(
          Gemm<F>{block.n, s_.VP, n, w.P, at.is, at.ts, tokens_.dr + x * s_.VP, s_.VP, w.dv, s_.VP, x > 0 || f_.range});
    }
    if (p_.d_mask) add_sums<F>(w.D, at, n, block.n, w.dm, nullptr);
  }

  // dq of tokens [p0, p0 + pn): adds up the chunks in order.
  void store_queries(int64_t p0, int64_t pn) const {
    const TokenRows rows(p_.d_query, f_.lead, batch_, f_.T);
    for (int64_t t = 0; t < pn; ++t) {
      F* row = dqs_ + t * s_.KP;
      for (int64_t c = 1; c < s_.chunks; ++c) {
        for (int64_t a = 0; a < s_.K; ++a) row[a] += dqs_[(c * s_.panel + t) * s_.KP + a];
      }
      write_row<F>(row, s_.K, p_.d_query.dtype, rows.row(p0 + t));
    }
  }

  const AdditiveReadBackward& p_;
  const AdditiveRead& f_;
  const GradientShape<F>& s_;
  int64_t batch_;
  Panel<F> tokens_;
  TileSpans* tiles_;  // of a panel
  Slots<F> slots_;
  bool through_;  // is dh wanted?
  bool first_keys_, first_values_, first_mask_;
  F *d_vector_, *u_;
  F *dqs_, *dus_, *deltas_;  // of the chunks: [chunks][panel][KP], [chunks][KP], [chunks][panel]
};

template <class F>
void run(const AdditiveReadBackward& p) {
  const AdditiveRead& f = p.forward;
  const GradientShape<F> s(f.lead, f.T, f.N, f.K, f.V, true);
  Buffer<F> d_vectors(s.batches * s.KP);
  each_batch(
      s.batches, Batch<F>::bytes(s, bool(f.range)), f.lead, {&p.d_keys, &p.d_values, &p.d_mask},
      [&](int64_t batch, char* memory) { Batch<F>(p, s, batch, d_vectors.data() + batch * s.KP, memory).run(); });
  for (int64_t b = 0; p.d_vector && b < s.batches; ++b) {
    F* to = reinterpret_cast<F*>(p.d_vector.batch(f.lead, b));
    const F* from = d_vectors.data() + b * s.KP;
    const bool first = first_visit(p.d_vector, f.lead, b);
    for (int64_t a = 0; a < s.K; ++a) to[a] = first ? from[a] : to[a] + from[a];
  }
}

}  // namespace

void additive_read_backward(const AdditiveReadBackward& p) {
  if (p.forward.query.dtype == DType::f64) run<double>(p);
  else run<float>(p);
}

}  // namespace mk::MK_ISA
