// How gradients of score tiles are cut into panels of tokens and chunks of slots, and the working memory of a chunk.
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
// Fewer chunks than kTogether are cut into segments of tokens, up to so many tasks.
constexpr int64_t kSegmentTasks = 8;

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
  int64_t segments = 1;   // of a panel
  int64_t span;           // tiles of a segment
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
    const int64_t tiles = panel / tile;
    if (batches < kManyBatches && chunks < kTogether && chunks > 0) {
      const int64_t room = kPartialBytes / (sums() * int64_t(sizeof(F)));
      segments = most(1, least(least(div_up(kSegmentTasks, chunks), room), tiles / 2));
    }
    span = div_up(tiles, segments);
    segments = div_up(tiles, span);
  }

  // Numbers that the slots have: rows of dk and dv, and dm.
  int64_t sums() const { return N * (KP + VP + 1); }

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
      if (s.V > 0) pair_columns(block, slots.stored_values(), first, s.V, buffers.values, block.values, block.vs);
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
  F *P, *D;                         // of a block of slots and a tile of tokens
  F *dk, *dv, *dm;                  // of a block
  F *D2, *keys2;                    // D and keys as pairs of slots
  F *queries, *reads, *keys, *row;  // of a tile and a block with ranges: copies without odd rows; one row

  ChunkMemory(Arena& arena, const GradientShape<F>& s, bool ranges)
      : buffers(Slots<F>::buffers(arena, kSlotBlock, s.K, s.V)),
        P(arena.take<F>(kSlotBlock * most(s.lanes, kLanes<F>))),
        D(arena.take<F>(kSlotBlock * most(s.lanes, kLanes<F>))),
        dk(arena.take<F>(kSlotBlock * s.KP)),
        dv(arena.take<F>(kSlotBlock * s.VP)),
        dm(arena.take<F>(kSlotBlock)),
        D2(arena.take<F>(s.pairs ? kSlotBlock * s.lanes : 0)),
        keys2(arena.take<F>(s.pairs ? kSlotBlock * s.KP : 0)),
        queries(arena.take<F>(ranges ? s.tile * s.KP : 0)),
        reads(arena.take<F>(ranges ? s.tile * s.VP : 0)),
        keys(arena.take<F>(ranges ? kSlotBlock * s.KP : 0)),
        row(arena.take<F>(ranges ? s.KP : 0)) {}
};

// What the products of a tile take, padded rows of tokens and keys as pairs of slots, and dk and dv of the block.
template <class F>
struct ProductRows {
  const F *queries, *reads, *keys2;
  F *dk, *dv;
};

}  // namespace mk::MK_ISA
