// Gradients that come out of score tiles: d_query, d_keys, d_values, d_mask from dS (and P), block by block.
//
// Tokens are cut into panels and slots into chunks, both by shapes alone. Within a panel every chunk is a task: it owns its rows
// of d_keys, d_values and d_mask, sums them over the panel's tokens in cache, and writes a partial d_query; partial d_queries are
// then added in the order of the chunks. So nothing is computed twice, no order depends on threads, and the memory for partial
// results is bounded (kPartialBytes) however long the inputs are.
#pragma once

#include "cpu/tiles/pairs.h"
#include "cpu/tiles/parallel.h"
#include "cpu/tiles/streaming.h"

namespace mk::MK_ISA {

constexpr int64_t kPartialBytes = int64_t(4) << 20;
constexpr int64_t kChunks = 64;                  // at most so many chunks
constexpr int64_t kChunkSlots = 4 * kSlotBlock;  // of so many slots or more, before their number is rounded up
// Their number is a multiple of this where there are blocks enough, so that threads get alike. Two threads, K=V=128 T=1024
// N=4096, twelve chunks for eleven: softmax_read backward 185 -> 195 GFLOP/s, of bfloat16 331 -> 350.
constexpr int64_t kTogether = 4;
constexpr int64_t kManyBatches = 8;  // from so many on, batches run in parallel rather than the chunks of one

// Where the gradients go: float (double) tensors. A missing one is not wanted. tokens[t] receives -sum_i dS[t, i],
// the gradient of a number that was subtracted from all scores of the token.
struct GradientViews {
  View query, keys, values, mask, tokens;
};

template <class F>
struct GradientShape {
  int64_t batches, tokens, N, K, V, KP, VP;
  int64_t tile, lanes;    // tokens per tile, and register lanes they take
  int64_t chunks;         // of slots, which differ by a block at most
  int64_t panel, panels;  // tokens, a multiple of tile
  bool few;
  bool pairs = false;  // products are of pairs of bfloat16, into which P and D are rounded

  GradientShape(const Lead& lead, int64_t T, int64_t n, int64_t k, int64_t v, bool rows_only)
      : batches(lead.batches()),
        tokens(lead.folded() * T),
        N(n),
        K(k),
        V(v),
        KP(Slots<F>::padded(k)),
        VP(Slots<F>::padded(v)) {
    few = rows_only || few_tokens<F>(tokens);
    tile = few_tokens<F>(tokens) ? most(tokens, 1) : kTokenTile<F>;
    lanes = few ? tile : round_up(tile, kLanes<F>);
    const int64_t chunk = round_up(most(kChunkSlots, div_up(N, kChunks)), kSlotBlock);
    chunks = least(round_up(div_up(N, chunk), kTogether), div_up(N, kSlotBlock));
    const int64_t fits = kPartialBytes / (most(chunks, 1) * most(KP, 1) * int64_t(sizeof(F)));
    panel = most(1, least(fits, tokens) / tile) * tile;
    if (tokens <= fits) panel = round_up(most(tokens, 1), tile);
    panels = div_up(tokens, panel);
  }

  // The first slot of chunk c.
  int64_t begin(int64_t c) const { return c == chunks ? N : div_up(N, kSlotBlock) * c / chunks * kSlotBlock; }
};

// Tiles of scores: element (t, slot) at data[t * ts + slot * is].
template <class F>
struct TileStrides {
  int64_t ts, is;
};

// Is this the first time that the rows of `view` belonging to `batch` are written? False when an earlier batch shares them.
inline bool first_visit(const View& view, const Lead& lead, int64_t batch) {
  for (int d = lead.rank - 1; d >= 0; --d) {
    if (lead.shared[d]) continue;
    if (batch % lead.size[d] != 0 && view.lead[d] == 0) return false;
    batch /= lead.size[d];
  }
  return true;
}
inline bool rows_are_shared(const View& view, const Lead& lead) {
  if (!view) return false;
  for (int d = 0; d < lead.rank; ++d) {
    if (!lead.shared[d] && lead.size[d] > 1 && view.lead[d] == 0) return true;
  }
  return false;
}

// sums[j] += sum_t D(t, j), and tokens[t] += sum_j D(t, j) where wanted.
template <class F>
inline void add_sums(const F* D, TileStrides<F> at, int64_t n, int64_t slots, F* sums, F* tokens) {
  constexpr int W = kLanes<F>;
  if (at.is == 1) {
    for (int64_t t = 0; t < n; ++t) {
      const F* d = D + t * at.ts;
      F total = 0;
      for (int64_t j = 0; j < slots; ++j) sums[j] += d[j], total += d[j];
      if (tokens != nullptr) tokens[t] += total;
    }
    return;
  }
  for (int64_t j = 0; j < slots; ++j) {  // lanes past n hold zeros
    Vec<F> total = load<F>(D + j * at.is);
    for (int64_t l = W; l < at.is; l += W) total += load<F>(D + j * at.is + l);
    sums[j] += sum<F>(total);
  }
  for (int64_t j = 0; j < slots && tokens != nullptr; ++j) {
    for (int64_t t = 0; t < n; ++t) tokens[t] += D[j * at.is + t];
  }
}

// Adds (or assigns) factor * rows[j] to the rows of slots first + place(j); assigning clears the rows of empty slots. A result of
// so many `bytes` that it is not read from a cache again is assigned past the caches.
template <class F>
inline void scatter_rows(const View& view, const Lead& lead, int64_t batch, bool assign, int64_t first, int64_t count,
                         const SlotBlock<F>& block, const F* rows, int64_t ld, int64_t width, F factor,
                         int64_t bytes = 0) {
  constexpr int W = kLanes<F>;
  char* base = view.batch(lead, batch) + first * view.row;
  if (assign && block.n < count) {
    for (int64_t i = 0; i < count; ++i) std::memset(base + i * view.row, 0, size_t(width) * sizeof(F));
  }
  auto row = [&](int64_t j) { return reinterpret_cast<F*>(base + block.place(j) * view.row); };
  if (!assign) {
    for (int64_t j = 0; j < block.n; ++j) {
      F* out = row(j);
      const F* in = rows + j * ld;
      for (int64_t c = 0; c < width; ++c) out[c] += factor * in[c];
    }
    return;
  }
  put_past(goes_past(base, view.row, bytes), [&](auto put) {
    for (int64_t j = 0; j < block.n; ++j) {
      F* out = row(j);
      const F* in = rows + j * ld;
      int64_t c = 0;
      for (; c + W <= width; c += W) put(out + c, factor * load<F>(in + c));
      for (; c < width; ++c) out[c] = factor * in[c];
    }
  });
}

// A block of slots; of pairs its rows as pairs of columns, and its keys as pairs of slots too, [block / 2][KP].
template <class F>
SlotBlock<F> gradient_block(const Slots<F>& slots, const GradientShape<F>& s, int64_t first, int64_t count,
                            const typename Slots<F>::Buffers& buffers, [[maybe_unused]] F* keys2) {
  if constexpr (kHasPairs<F>) {
    if (s.pairs) {
      SlotBlock<F> block = slots.list(first, count, buffers);
      pair_columns(block, slots.stored_keys(), first, s.K, buffers.keys, block.keys, block.ks);
      pair_columns(block, slots.stored_values(), first, s.V, buffers.values, block.values, block.vs);
      pair_rows(block.n, s.K, s.KP, keys2, [&](int64_t j) { return slots.stored_keys().row(first + block.place(j)); });
      return block;
    }
  }
  return slots.load(first, count, buffers);
}

// Runs the scheme above. `Kernel` supplies what differs between ops:
//   size_t packed(shape)                 elements of F that it packs per tile
//   void pack(batch, t0, n, F* tile)     packs n tokens
//   size_t scratch(shape)                bytes of its own per task
//   void tile(batch, first, count, block, t0, n, const F* packed, F* P, F* D, TileStrides)   fills P (if wanted) and D = dS
//   const F* queries(packed), const F* reads(packed)   padded rows [n][KP] and [n][VP] in the packed tile; of pairs [n / 2] of them
template <class F, class Kernel>
void score_gradients(const Lead& lead, const SlotView& keys, const SlotView& values, const View& mask, double scale,
                     const GradientShape<F>& s, const GradientViews& out, const Kernel& kernel) {
  const int64_t tile_elements = round_up(int64_t(kernel.packed(s)), 16);
  const int64_t tiles = s.panel / s.tile;
  const int64_t partial = s.panel * s.KP;
  const bool query = bool(out.query);

  auto one_batch = [&](int64_t batch, char* memory) {
    Arena shared(memory);
    F* packed = shared.take<F>(tiles * tile_elements);
    F* partials = shared.take<F>(query ? s.chunks * partial : 0);
    F* token_sums = shared.take<F>(out.tokens ? s.chunks * s.panel : 0);
    const Slots<F> slots(keys, values, mask, lead, batch, s.N, s.K, s.V, true);
    const bool first_keys = out.keys && first_visit(out.keys, lead, batch);
    const bool first_values = out.values && first_visit(out.values, lead, batch);
    const bool first_mask = out.mask && first_visit(out.mask, lead, batch);

    Arena measure;
    Slots<F>::buffers(measure, kSlotBlock, s.K, s.V);
    measure.take<F>(3 * kSlotBlock * most(s.lanes, kLanes<F>) + kSlotBlock * (2 * s.KP + s.VP + 1));
    const size_t bytes = measure.used() + kernel.scratch(s) + 8 * 64;

    for (int64_t panel = 0; panel < s.panels; ++panel) {
      const int64_t p0 = panel * s.panel, pn = least(s.panel, s.tokens - p0);
      const int64_t live = div_up(pn, s.tile);
      parallel(live, 0, [&](int64_t i, char*) {
        FlushDenormals flush;
        kernel.pack(batch, p0 + i * s.tile, least(s.tile, pn - i * s.tile), packed + i * tile_elements);
      });
      parallel(s.chunks, bytes, [&](int64_t c, char* own) {
        FlushDenormals flush;
        Arena arena(own);
        const auto buffers = Slots<F>::buffers(arena, kSlotBlock, s.K, s.V);
        F* P = arena.take<F>(kSlotBlock * most(s.lanes, kLanes<F>));
        F* D = arena.take<F>(kSlotBlock * most(s.lanes, kLanes<F>));
        F* dk = arena.take<F>(kSlotBlock * s.KP);
        F* dv = arena.take<F>(kSlotBlock * s.VP);
        F* dm = arena.take<F>(kSlotBlock);
        F* D2 = arena.take<F>(s.pairs ? kSlotBlock * s.lanes : 0);  // D as pairs of slots, and keys
        F* keys2 = arena.take<F>(s.pairs ? kSlotBlock * s.KP : 0);
        F* dq = query ? partials + c * partial : nullptr;
        F* sums = token_sums + c * s.panel;
        bool begun = false;  // is anything in dq?
        if (out.tokens) std::memset(sums, 0, size_t(s.panel) * sizeof(F));
        const int64_t hi = s.begin(c + 1);
        for (int64_t i = s.begin(c); i < hi; i += kSlotBlock) {
          const int64_t count = least(kSlotBlock, hi - i);
          const SlotBlock<F> block = gradient_block(slots, s, i, count, buffers, keys2);
          for (int64_t j = 0; j < block.n; ++j) dm[j] = 0;
          for (int64_t x = 0; x < live && block.n > 0; ++x) {
            const int64_t n = least(s.tile, pn - x * s.tile);
            const int64_t L = s.few ? n : round_up(n, kLanes<F>);
            const TileStrides<F> at = s.few ? TileStrides<F>{kSlotBlock, 1} : TileStrides<F>{1, L};
            const F* tile = packed + x * tile_elements;
            kernel.tile(batch, i, block, p0 + x * s.tile, n, tile, P, D, at, arena);
            const bool more = x > 0;
            if (out.mask || out.tokens) add_sums<F>(D, at, n, block.n, dm, out.tokens ? sums + x * s.tile : nullptr);
            if constexpr (kHasPairs<F>) {
              if (s.pairs) {
                const int64_t t2 = div_up(n, 2), L2 = L / 2;
                if (query) pair_slots(D, block.n, L, D2);
                pair_tokens(P, block.n, L);
                pair_tokens(D, block.n, L);
                if (out.values)
                  gemm_pairs({block.n, s.VP, t2, P, L2, 1, kernel.reads(s, tile), s.VP, dv, s.VP, more}, 1);
                if (out.keys)
                  gemm_pairs({block.n, s.KP, t2, D, L2, 1, kernel.queries(s, tile), s.KP, dk, s.KP, more}, 1);
                if (query) {
                  gemm_pairs({n, s.KP, div_up(block.n, 2), D2, 1, L, keys2, s.KP, dq + x * s.tile * s.KP, s.KP, begun},
                             1);
                }
                continue;
              }
            }
            if (out.values)
              gemm(Gemm<F>{block.n, s.VP, n, P, at.is, at.ts, kernel.reads(s, tile), s.VP, dv, s.VP, more});
            if (out.keys)
              gemm(Gemm<F>{block.n, s.KP, n, D, at.is, at.ts, kernel.queries(s, tile), s.KP, dk, s.KP, more});
            if (query) {
              gemm(Gemm<F>{n, s.KP, block.n, D, at.ts, at.is, block.keys, block.ks, dq + x * s.tile * s.KP, s.KP,
                           begun});
            }
          }
          begun = begun || block.n > 0;
          const bool start = panel == 0;
          if (out.keys) {
            scatter_rows<F>(out.keys, lead, batch, start && first_keys, i, count, block, dk, s.KP, s.K, F(scale),
                            s.N * s.K * int64_t(sizeof(F)));
          }
          if (out.values) {
            scatter_rows<F>(out.values, lead, batch, start && first_values, i, count, block, dv, s.VP, s.V, F(1),
                            s.N * s.V * int64_t(sizeof(F)));
          }
          if (out.mask) scatter_rows<F>(out.mask, lead, batch, start && first_mask, i, count, block, dm, 1, 1, F(1));
        }
        if (query && !begun) std::memset(dq, 0, size_t(partial) * sizeof(F));
      });
      const int64_t T = s.tokens / most(lead.folded(), 1);
      if (out.tokens) {
        const TokenRows totals(out.tokens, lead, batch, T);
        for (int64_t t = 0; t < pn; ++t) {
          F total = 0;
          for (int64_t g = 0; g < s.chunks; ++g) total -= token_sums[g * s.panel + t];
          *reinterpret_cast<F*>(totals.row(p0 + t)) = total;
        }
      }
      if (!query) continue;
      const TokenRows rows(out.query, lead, batch, T);
      parallel(live, size_t(s.KP) * sizeof(F), [&](int64_t x, char* own) {
        F* sum = reinterpret_cast<F*>(own);
        for (int64_t t = x * s.tile; t < least((x + 1) * s.tile, pn); ++t) {
          for (int64_t c = 0; c < s.KP; ++c) sum[c] = 0;
          for (int64_t g = 0; g < s.chunks; ++g) {
            const F* part = partials + g * partial + t * s.KP;
            for (int64_t c = 0; c < s.KP; ++c) sum[c] += part[c];
          }
          F* row = reinterpret_cast<F*>(rows.row(p0 + t));
          for (int64_t c = 0; c < s.K; ++c) row[c] = F(scale) * sum[c];
        }
      });
    }
  };

  const size_t memory = size_t(tiles * tile_elements + s.chunks * (partial + s.panel) + 64) * sizeof(F);
  const bool apart =
      !rows_are_shared(out.keys, lead) && !rows_are_shared(out.values, lead) && !rows_are_shared(out.mask, lead);
  if (s.batches >= kManyBatches && apart) {
    parallel(s.batches, memory, one_batch);
  } else {
    Buffer<char> whole{int64_t(memory)};
    for (int64_t b = 0; b < s.batches; ++b) one_batch(b, whole.data());
  }
}

}  // namespace mk::MK_ISA
