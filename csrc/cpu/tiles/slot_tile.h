// A tile of slots in the backward of gated_write: what its sweeps over the tokens read, and what they sum.
#pragma once

#include "cpu/tiles/opened_gates.h"

namespace mk::MK_ISA {

// A tile of slots, and a chunk of the tokens.
template <class F>
struct SlotTile {
  int64_t first, count;
  SlotBlock<F> block, content;  // keys; rows of U, and what the slots held before
  KeyLanes<F> lanes;
  typename Tokens<F>::Buffers buffers;
  TokenChunk<F> chunk;

  SlotTile(const GatedWrite& p, const Slots<F>& keys, const Slots<F>& contents, int64_t first, Arena& arena)
      : first(first),
        count(least(kSlotTile<F>, p.N - first)),
        block(keys.load(first, count, Slots<F>::buffers(arena, kSlotTile<F>, p.K, 0))),
        content(contents.load(first, count, Slots<F>::buffers(arena, kSlotTile<F>, p.V, p.V))),
        lanes(arena, p.K),
        buffers(Tokens<F>::buffers(arena, p)) {
    lanes.pack(block, p.K, F(p.scale));
  }
};

// What the forward sweep computes for a tile. Rows have the slots as lanes.
template <class F>
struct SlotSums {
  Opened<F> opened;   // of a chunk that the sweep back did not keep
  F *D, *U;           // [chunk][lane]: c, then dS;  [V][lane]
  F *dk, *dm;         // [K][lane], [lane]
  F* rows;            // dk again: [slot][KP]
  F *past, *suffix;   // p and R: [lane]
  F* kept;            // d_retained * retained: [lane]
  bool held = false;  // is `kept` not 0 somewhere?

  SlotSums(const GatedWrite& p, Arena& arena)
      : opened(arena),
        D(arena.take<F>(kChunkTokens * kSlotTile<F>)),
        U(arena.take<F>(p.V * kSlotTile<F>)),
        dk(arena.take<F>(p.K * kSlotTile<F>)),
        dm(arena.take<F>(kSlotTile<F>)),
        rows(arena.take<F>(Slots<F>::padded(p.K) * kSlotTile<F>)),
        past(arena.take<F>(kSlotTile<F>)),
        suffix(arena.take<F>(kSlotTile<F>)),
        kept(arena.take<F>(kSlotTile<F>)) {}
};

}  // namespace mk::MK_ISA
