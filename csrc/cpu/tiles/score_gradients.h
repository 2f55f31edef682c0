// Gradients computed from score tiles: d_query, d_keys, d_values, d_mask from dS (and P), block by block.
//
// Tokens are split into panels and slots into chunks, by shapes only. Within a panel every chunk is a task. It owns its
// rows of d_keys, d_values and d_mask, sums them over the panel's tokens in cache, and writes a partial d_query.
// Partial d_queries are then added in the order of the chunks. So nothing is computed twice, the order does not depend
// on threads, and the memory of partial results is bounded (kPartialBytes) however long the inputs are.
#pragma once

#include "cpu/tiles/gradient_rows.h"
#include "cpu/tiles/pairs.h"

namespace mk::MK_ISA {

// At least so many slots per chunk, before the number of chunks is rounded up.
constexpr int64_t kChunkSlots = 4 * kSlotBlock;
// The number of chunks is rounded up to a multiple of this if there are enough blocks, for load balance. Two threads,
// K=V=128 T=1024 N=4096, twelve chunks instead of eleven: softmax_read backward 185 -> 195 GFLOP/s, of bfloat16
// 331 -> 350.
constexpr int64_t kTogether = 4;

// The outputs: float (double) tensors. A missing one is not wanted. tokens[t] receives -sum_i dS[t, i], the gradient of
// a number that was subtracted from all scores of the token.
struct GradientViews {
  View query, keys, values, mask, tokens;
};

template <class F>
struct GradientShape {
  int64_t batches, tokens, N, K, V, KP, VP;
  int64_t tile, lanes;    // tokens per tile, and the register lanes that they take
  int64_t chunks;         // of slots; they differ by at most one block
  int64_t panel, panels;  // tokens, a multiple of tile
  bool few;
  bool pairs = false;  // products are of pairs of bfloat16; P and D are rounded to them

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

// A block of slots. For pairs: its rows as pairs of columns, and its keys also as pairs of slots, [block / 2][KP].
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

// The working memory of a chunk of slots.
template <class F>
struct ChunkMemory {
  typename Slots<F>::Buffers buffers;
  F *P, *D;         // of a block of slots and a tile of tokens
  F *dk, *dv, *dm;  // of a block
  F *D2, *keys2;    // D and keys as pairs of slots

  ChunkMemory(Arena& arena, const GradientShape<F>& s)
      : buffers(Slots<F>::buffers(arena, kSlotBlock, s.K, s.V)),
        P(arena.take<F>(kSlotBlock * most(s.lanes, kLanes<F>))),
        D(arena.take<F>(kSlotBlock * most(s.lanes, kLanes<F>))),
        dk(arena.take<F>(kSlotBlock * s.KP)),
        dv(arena.take<F>(kSlotBlock * s.VP)),
        dm(arena.take<F>(kSlotBlock)),
        D2(arena.take<F>(s.pairs ? kSlotBlock * s.lanes : 0)),
        keys2(arena.take<F>(s.pairs ? kSlotBlock * s.KP : 0)) {}
};

// What the gradients are computed from, and where they go.
template <class F, class Kernel>
struct GradientCall {
  const Lead& lead;
  const SlotView &keys, &values;
  const View& mask;
  double scale;
  const GradientShape<F>& s;
  const GradientViews& out;
  const Kernel& kernel;
};

// The gradients of one batch.
template <class F, class Kernel>
class BatchGradients {
 public:
  BatchGradients(const GradientCall<F, Kernel>& call, int64_t batch, char* memory)
      : s_(call.s),
        lead_(call.lead),
        out_(call.out),
        kernel_(call.kernel),
        scale_(F(call.scale)),
        batch_(batch),
        slots_(call.keys, call.values, call.mask, lead_, batch, s_.N, s_.K, s_.V, true),
        first_keys_(out_.keys && first_visit(out_.keys, lead_, batch)),
        first_values_(out_.values && first_visit(out_.values, lead_, batch)),
        first_mask_(out_.mask && first_visit(out_.mask, lead_, batch)) {
    Arena arena(memory);
    packed_ = arena.take<F>(s_.panel / s_.tile * tile_elements());
    partials_ = arena.take<F>(out_.query ? s_.chunks * s_.panel * s_.KP : 0);
    token_sums_ = arena.take<F>(out_.tokens ? s_.chunks * s_.panel : 0);
  }
  static size_t bytes(const GradientShape<F>& s, const Kernel& kernel) {
    return size_t(s.panel / s.tile * tile_elements(s, kernel) + s.chunks * (s.panel * s.KP + s.panel) + 64) * sizeof(F);
  }

  void run() const {
    Arena measure;
    ChunkMemory<F>(measure, s_);
    const size_t bytes = measure.used() + kernel_.scratch(s_) + 8 * 64;
    for (int64_t i = 0; i < s_.panels; ++i) {
      const int64_t first = i * s_.panel, tokens = least(s_.panel, s_.tokens - first);
      const Panel panel{first, tokens, div_up(tokens, s_.tile)};
      parallel(panel.tiles, 0, [&](int64_t x, char*) {
        FlushDenormals flush;
        kernel_.pack(batch_, first + x * s_.tile, panel.tile(s_, x), packed_ + x * tile_elements());
      });
      parallel(s_.chunks, bytes, [&](int64_t c, char* own) {
        FlushDenormals flush;
        add_chunk(panel, c, Arena(own));
      });
      if (out_.tokens) store_token_sums(panel);
      if (out_.query) store_queries(panel);
    }
  }

 private:
  // Tokens [first, first + tokens) in so many tiles.
  struct Panel {
    int64_t first, tokens, tiles;
    int64_t tile(const GradientShape<F>& s, int64_t x) const { return least(s.tile, tokens - x * s.tile); }
  };
  // The part of the sums over slots that a chunk has: dq [panel, KP] and, of the tokens, -dS summed [panel].
  struct Partial {
    F *dq, *tokens;
    bool begun = false;  // has dq been written?
  };

  static int64_t tile_elements(const GradientShape<F>& s, const Kernel& kernel) {
    return round_up(int64_t(kernel.packed(s)), 16);
  }
  int64_t tile_elements() const { return tile_elements(s_, kernel_); }
  int64_t T() const { return s_.tokens / most(lead_.folded(), 1); }

  // The gradients of the slots of a chunk, summed over the tokens of a panel, and its partial d_query.
  void add_chunk(const Panel& panel, int64_t c, Arena arena) const {
    const ChunkMemory<F> w(arena, s_);
    Partial part{out_.query ? partials_ + c * s_.panel * s_.KP : nullptr,
                 out_.tokens ? token_sums_ + c * s_.panel : nullptr};
    if (part.tokens != nullptr) std::memset(part.tokens, 0, size_t(s_.panel) * sizeof(F));
    const int64_t hi = s_.begin(c + 1);
    for (int64_t i = s_.begin(c); i < hi; i += kSlotBlock) {
      const int64_t count = least(kSlotBlock, hi - i);
      const SlotBlock<F> block = gradient_block(slots_, s_, i, count, w.buffers, w.keys2);
      for (int64_t j = 0; j < block.n; ++j) w.dm[j] = 0;
      for (int64_t x = 0; x < panel.tiles && block.n > 0; ++x) add_tile(panel, x, i, block, w, part, arena);
      part.begun = part.begun || block.n > 0;
      store_block(panel.first == 0, i, count, block, w);
    }
    if (part.dq != nullptr && !part.begun) std::memset(part.dq, 0, size_t(s_.panel * s_.KP) * sizeof(F));
  }

  // P and D = dS of a block of slots, from `first` on, and tile x of the panel; then their products and sums.
  void add_tile(const Panel& panel, int64_t x, int64_t first, const SlotBlock<F>& block, const ChunkMemory<F>& w,
                const Partial& part, Arena& arena) const {
    const int64_t t0 = x * s_.tile, n = panel.tile(s_, x), L = s_.few ? n : round_up(n, kLanes<F>);
    const TileStrides<F> at = s_.few ? TileStrides<F>{kSlotBlock, 1} : TileStrides<F>{1, L};
    const F* tile = packed_ + x * tile_elements();
    kernel_.tile(batch_, first, block, panel.first + t0, n, tile, w.P, w.D, at, arena);
    if (out_.mask || out_.tokens) {
      add_sums<F>(w.D, at, n, block.n, w.dm, part.tokens == nullptr ? nullptr : part.tokens + t0);
    }
    F* dq = part.dq == nullptr ? nullptr : part.dq + t0 * s_.KP;
    if constexpr (kHasPairs<F>) {
      if (s_.pairs) {
        multiply_pairs(block, n, L, tile, w, x > 0, dq, part.begun);
        return;
      }
    }
    multiply(block, n, at, tile, w, x > 0, dq, part.begun);
  }

  // dv += P^T reads and dk += D^T queries of the tile, dq += D keys. `more`, `begun`: there are sums already.
  void multiply(const SlotBlock<F>& block, int64_t n, TileStrides<F> at, const F* tile, const ChunkMemory<F>& w,
                bool more, F* dq, bool begun) const {
    if (out_.values) {
      gemm(Gemm<F>{block.n, s_.VP, n, w.P, at.is, at.ts, kernel_.reads(s_, tile), s_.VP, w.dv, s_.VP, more});
    }
    if (out_.keys) {
      gemm(Gemm<F>{block.n, s_.KP, n, w.D, at.is, at.ts, kernel_.queries(s_, tile), s_.KP, w.dk, s_.KP, more});
    }
    if (dq != nullptr) gemm(Gemm<F>{n, s_.KP, block.n, w.D, at.ts, at.is, block.keys, block.ks, dq, s_.KP, begun});
  }

  // The same with pairs of bfloat16; P and D become pairs of tokens.
  void multiply_pairs(const SlotBlock<F>& block, int64_t n, int64_t L, const F* tile, const ChunkMemory<F>& w,
                      bool more, F* dq, bool begun) const
    requires kHasPairs<F>
  {
    const int64_t t2 = div_up(n, 2), L2 = L / 2;
    if (dq != nullptr) pair_slots(w.D, block.n, L, w.D2);
    pair_tokens(w.P, block.n, L);
    pair_tokens(w.D, block.n, L);
    if (out_.values) {
      gemm_pairs({block.n, s_.VP, t2, w.P, L2, 1, kernel_.reads(s_, tile), s_.VP, w.dv, s_.VP, more}, 1);
    }
    if (out_.keys) {
      gemm_pairs({block.n, s_.KP, t2, w.D, L2, 1, kernel_.queries(s_, tile), s_.KP, w.dk, s_.KP, more}, 1);
    }
    if (dq != nullptr) {
      gemm_pairs({n, s_.KP, div_up(block.n, 2), w.D2, 1, L, w.keys2, s_.KP, dq, s_.KP, begun}, 1);
    }
  }

  // Stores dk, dv and dm of slots [first, first + count), or adds them to what earlier panels or batches stored.
  void store_block(bool start, int64_t first, int64_t count, const SlotBlock<F>& block, const ChunkMemory<F>& w) const {
    if (out_.keys) {
      scatter_rows<F>(out_.keys, lead_, batch_, start && first_keys_, first, count, block, w.dk, s_.KP, s_.K, scale_,
                      s_.N * s_.K * int64_t(sizeof(F)));
    }
    if (out_.values) {
      scatter_rows<F>(out_.values, lead_, batch_, start && first_values_, first, count, block, w.dv, s_.VP, s_.V, F(1),
                      s_.N * s_.V * int64_t(sizeof(F)));
    }
    if (out_.mask) {
      scatter_rows<F>(out_.mask, lead_, batch_, start && first_mask_, first, count, block, w.dm, 1, 1, F(1));
    }
  }

  // tokens[t] = -sum_i dS[t, i]: adds up the chunks in order.
  void store_token_sums(const Panel& panel) const {
    const TokenRows rows(out_.tokens, lead_, batch_, T());
    for (int64_t t = 0; t < panel.tokens; ++t) {
      F total = 0;
      for (int64_t g = 0; g < s_.chunks; ++g) total -= token_sums_[g * s_.panel + t];
      *reinterpret_cast<F*>(rows.row(panel.first + t)) = total;
    }
  }

  // d_query = scale dS K: adds up the chunks in order.
  void store_queries(const Panel& panel) const {
    const TokenRows rows(out_.query, lead_, batch_, T());
    parallel(panel.tiles, size_t(s_.KP) * sizeof(F), [&](int64_t x, char* own) {
      F* sum = reinterpret_cast<F*>(own);
      for (int64_t t = x * s_.tile; t < least((x + 1) * s_.tile, panel.tokens); ++t) {
        for (int64_t c = 0; c < s_.KP; ++c) sum[c] = 0;
        for (int64_t g = 0; g < s_.chunks; ++g) {
          const F* part = partials_ + (g * s_.panel + t) * s_.KP;
          for (int64_t c = 0; c < s_.KP; ++c) sum[c] += part[c];
        }
        F* row = reinterpret_cast<F*>(rows.row(panel.first + t));
        for (int64_t c = 0; c < s_.K; ++c) row[c] = scale_ * sum[c];
      }
    });
  }

  const GradientShape<F>& s_;
  const Lead& lead_;
  const GradientViews& out_;
  const Kernel& kernel_;
  F scale_;
  int64_t batch_;
  Slots<F> slots_;
  bool first_keys_, first_values_, first_mask_;
  F *packed_, *partials_, *token_sums_;
};

// Runs the scheme above. `Kernel` has what differs between ops:
//   size_t packed(shape)                 elements of F that it packs per tile
//   void pack(batch, t0, n, F* tile)     packs n tokens
//   size_t scratch(shape)                its own scratch bytes per task
//   void tile(batch, first, count, block, t0, n, const F* packed, F* P, F* D, TileStrides)
//                                        computes P (if wanted) and D = dS
//   const F* queries(packed), const F* reads(packed)
//                                        padded rows [n][KP] and [n][VP] in the packed tile; of pairs [n / 2] of them
template <class F, class Kernel>
void score_gradients(const Lead& lead, const SlotView& keys, const SlotView& values, const View& mask, double scale,
                     const GradientShape<F>& s, const GradientViews& out, const Kernel& kernel) {
  const GradientCall<F, Kernel> call{lead, keys, values, mask, scale, s, out, kernel};
  each_batch(s.batches, BatchGradients<F, Kernel>::bytes(s, kernel), lead, {&out.keys, &out.values, &out.mask},
             [&](int64_t batch, char* memory) { BatchGradients<F, Kernel>(call, batch, memory).run(); });
}

}  // namespace mk::MK_ISA
