// additive_read backward. With p = exp(s - lse), dP[t, i] = <dr_t, v_i>, delta_t = <dr_t, r_t> - dlse_t, h = tanh(q_ta
// + k_ia):
//
//   ds = p * (dP - delta),  dh = ds u (1 - h^2),  dq_ta = sum_i dh,  dk_ia = sum_t dh,  du_a = sum_ti ds h,
//   dv = P^T dR,  dmask_i = sum_t ds
//
// Each h is computed once: for one token and a block of slots it waits in cache ([96, K]) until ds is known. Lanes run
// along K, so no sum crosses them but that of the score.
//
// Chunks of slots are the tasks. Each owns its rows of dk, dv and dmask and adds a partial dq and du; the partial sums
// are then added in the order of the chunks. delta is taken from the read where that is exact. One that was rounded to
// 16 bits is not good enough: unlike keys, u (1 - h^2) has one sign, so that an error of delta does not average out in
// dq. Then a pass over the scores sums delta_t = sum_i p dP - dlse_t first. Tokens come in panels, so that partial
// results stay within kPartialBytes. With many batches these run in parallel instead, unless they share memory. The
// gradient of u is kept per batch and added last.
#include "cpu/tiles/additive_scores.h"
#include "cpu/tiles/score_gradients.h"
#include "params/additive_read.h"

namespace mk::MK_ISA {
namespace {

// One panel of tokens: queries and d_reads as padded rows, lse with its rest, delta.
template <class F>
struct Panel {
  F *q, *dr, *lse, *rest, *delta;

  Panel(Arena& arena, const GradientShape<F>& s)
      : q(arena.take<F>(s.panel * s.KP)),
        dr(arena.take<F>(s.panel * s.VP)),
        lse(arena.take<F>(s.panel)),
        rest(arena.take<F>(s.panel)),
        delta(arena.take<F>(s.panel)) {}

  // Does the read hold what was summed?
  static bool exact(const AdditiveReadBackward& p) { return p.forward.read.dtype == kOwn<F>; }

  // Tokens [first, end) of the panel that begins at token t0.
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
      lse[t] = l == -kInf<F> ? kInf<F> : l;  // a token that reads nothing has p = exp(s - inf) = 0
      rest[t] = *reinterpret_cast<const F*>(rests.row(t0 + t));
      delta[t] = d_lse ? -*reinterpret_cast<const F*>(d_lse.row(t0 + t)) : F(0);
      if (!exact(p)) continue;
      read_row<F>(read.row(t0 + t), read.dtype, f.V, row);
      for (int64_t v = 0; v < f.V; ++v) delta[t] += row[v] * dr[t * s.VP + v];
    }
  }
};

// What a chunk of slots works in, and its partial sums: dq of the panel, du.
template <class F>
struct Chunk {
  F *P, *D, *hidden, *dk, *dv, *dm;
  typename Slots<F>::Buffers buffers;

  Chunk(Arena& arena, const GradientShape<F>& s)
      : P(arena.take<F>(s.tile * kSlotBlock)),
        D(arena.take<F>(s.tile * kSlotBlock)),
        hidden(arena.take<F>(kSlotBlock * s.KP)),
        dk(arena.take<F>(kSlotBlock * s.KP)),
        dv(arena.take<F>(kSlotBlock * s.VP)),
        dm(arena.take<F>(kSlotBlock)),
        buffers(Slots<F>::buffers(arena, kSlotBlock, s.K, s.V)) {}
};

// dh of one token and n slots into the three sums, for some registers of columns.
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

template <class F>
void run(const AdditiveReadBackward& p) {
  constexpr int W = kLanes<F>;
  const AdditiveRead& f = p.forward;
  const GradientShape<F> s(f.lead, f.T, f.N, f.K, f.V, true);
  const bool through = p.d_query || p.d_keys || p.d_vector;
  const int64_t partial = s.panel * s.KP;
  Buffer<F> d_vectors(s.batches * s.KP);

  auto one_batch = [&](int64_t batch, char* memory) {
    Arena shared(memory);
    const Panel<F> tokens(shared, s);
    F* u = shared.take<F>(s.KP);
    F* dqs = shared.take<F>(s.chunks * partial);
    F* dus = shared.take<F>(s.chunks * s.KP);
    F* deltas = shared.take<F>(s.chunks * s.panel);
    F* d_vector = d_vectors.data() + batch * s.KP;
    padded_row<F>(f.vector.batch(f.lead, batch), f.vector.dtype, s.K, u);
    std::memset(d_vector, 0, size_t(s.KP) * sizeof(F));
    const Slots<F> slots(f.keys, f.values, f.mask, f.lead, batch, f.N, s.K, s.V, true);
    const bool first_keys = p.d_keys && first_visit(p.d_keys, f.lead, batch);
    const bool first_values = p.d_values && first_visit(p.d_values, f.lead, batch);
    const bool first_mask = p.d_mask && first_visit(p.d_mask, f.lead, batch);
    Arena measure;
    Chunk<F>(measure, s);

    for (int64_t panel = 0; panel < s.panels; ++panel) {
      const int64_t p0 = panel * s.panel, pn = least(s.panel, s.tokens - p0);
      parallel(div_up(pn, s.tile), size_t(s.VP) * sizeof(F), [&](int64_t x, char* row) {
        const int64_t first = x * s.tile, end = least(pn, first + s.tile);
        tokens.pack(p, s, batch, p0, first, end, reinterpret_cast<F*>(row));
      });
      // ps = p of one token and a block of slots.
      auto weigh = [&](const SlotBlock<F>& block, int64_t t, F* ps, F* hidden) {
        additive_row<F>(block, s.K, tokens.q + t * s.KP, u, ps, hidden);
        const Vec<F> lse = fill<F>(tokens.lse[t]), rest = fill<F>(tokens.rest[t]);
        for (int64_t j = 0; j < block.n; j += W) store<F>(ps + j, weight<F>(load<F>(ps + j), lse, rest));
      };
      // D = dP of n tokens.
      auto products = [&](const SlotBlock<F>& block, int64_t x, int64_t n, F* D) {
        dot_rows<F>(block.n, block.values, block.vs, s.V, tokens.dr + x * s.VP, n, F(0), D, kSlotBlock);
      };
      auto each_block = [&](int64_t c, const Chunk<F>& w, auto&& body) {
        const int64_t hi = s.begin(c + 1);
        for (int64_t i = s.begin(c); i < hi; i += kSlotBlock) {
          const int64_t count = least(kSlotBlock, hi - i);
          body(i, count, slots.load(i, count, w.buffers));
        }
      };
      if (!tokens.exact(p)) {
        parallel(s.chunks, measure.used(), [&](int64_t c, char* own) {
          FlushDenormals flush;
          Arena arena(own);
          const Chunk<F> w(arena, s);
          F* delta = deltas + c * s.panel;
          std::memset(delta, 0, size_t(pn) * sizeof(F));
          each_block(c, w, [&](int64_t, int64_t, const SlotBlock<F>& block) {
            for (int64_t x = 0; x < pn && block.n > 0; x += s.tile) {
              const int64_t n = least(s.tile, pn - x);
              products(block, x, n, w.D);
              for (int64_t t = 0; t < n; ++t) {
                weigh(block, x + t, w.P, nullptr);
                Vec<F> acc = fill<F>(0);
                for (int64_t j = 0; j < block.n; j += W) acc += load<F>(w.P + j) * load<F>(w.D + t * kSlotBlock + j);
                delta[x + t] += sum<F>(acc);
              }
            }
          });
        });
        for (int64_t c = 0; c < s.chunks; ++c) {
          for (int64_t t = 0; t < pn; ++t) tokens.delta[t] += deltas[c * s.panel + t];
        }
      }
      parallel(s.chunks, measure.used(), [&](int64_t c, char* own) {
        FlushDenormals flush;
        Arena arena(own);
        const Chunk<F> w(arena, s);
        F *dq = dqs + c * partial, *du = dus + c * s.KP;
        std::memset(dq, 0, size_t(pn * s.KP) * sizeof(F));
        std::memset(du, 0, size_t(s.KP) * sizeof(F));
        each_block(c, w, [&](int64_t i, int64_t count, const SlotBlock<F>& block) {
          std::memset(w.dk, 0, size_t(kSlotBlock * s.KP) * sizeof(F));
          std::memset(w.dm, 0, size_t(kSlotBlock) * sizeof(F));
          for (int64_t x = 0; x < pn && block.n > 0; x += s.tile) {
            const int64_t n = least(s.tile, pn - x);
            products(block, x, n, w.D);
            for (int64_t t = 0; t < n; ++t) {
              F *ps = w.P + t * kSlotBlock, *ds = w.D + t * kSlotBlock;
              weigh(block, x + t, ps, w.hidden);
              const Vec<F> delta = fill<F>(tokens.delta[x + t]);
              for (int64_t j = 0; j < block.n; j += W) store<F>(ds + j, load<F>(ps + j) * (load<F>(ds + j) - delta));
              if (through) add_hidden<F>(ds, w.hidden, u, block.n, s.KP, w.dk, dq + (x + t) * s.KP, du);
            }
            const TileStrides<F> at{kSlotBlock, 1};
            if (p.d_values) {
              gemm(Gemm<F>{block.n, s.VP, n, w.P, at.is, at.ts, tokens.dr + x * s.VP, s.VP, w.dv, s.VP, x > 0});
            }
            if (p.d_mask) add_sums<F>(w.D, at, n, block.n, w.dm, nullptr);
          }
          auto scatter = [&](const View& view, bool first, const F* rows, int64_t ld, int64_t width) {
            if (view) scatter_rows<F>(view, f.lead, batch, panel == 0 && first, i, count, block, rows, ld, width, F(1));
          };
          scatter(p.d_keys, first_keys, w.dk, s.KP, s.K);
          scatter(p.d_values, first_values, w.dv, s.VP, s.V);
          scatter(p.d_mask, first_mask, w.dm, 1, 1);
        });
      });
      for (int64_t c = 0; c < s.chunks; ++c) {
        for (int64_t a = 0; a < s.KP; ++a) d_vector[a] += dus[c * s.KP + a];
      }
      if (!p.d_query) continue;
      const TokenRows rows(p.d_query, f.lead, batch, f.T);
      for (int64_t t = 0; t < pn; ++t) {
        F* row = dqs + t * s.KP;
        for (int64_t c = 1; c < s.chunks; ++c) {
          for (int64_t a = 0; a < s.K; ++a) row[a] += dqs[c * partial + t * s.KP + a];
        }
        write_row<F>(row, s.K, p.d_query.dtype, rows.row(p0 + t));
      }
    }
  };

  Arena measure;
  Panel<F>(measure, s);
  measure.take<F>(2 * s.KP + s.chunks * (partial + s.KP + s.panel));
  const size_t memory = measure.used() + 5 * 64;
  const bool apart =
      !rows_are_shared(p.d_keys, f.lead) && !rows_are_shared(p.d_values, f.lead) && !rows_are_shared(p.d_mask, f.lead);
  if (s.batches >= kManyBatches && apart) {
    parallel(s.batches, memory, one_batch);
  } else {
    Buffer<char> whole{int64_t(memory)};
    for (int64_t b = 0; b < s.batches; ++b) one_batch(b, whole.data());
  }
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
