// The gates of a chunk of tokens with what later tokens leave of them, as the backward of gated_write keeps them.
#pragma once

#include "cpu/tiles/write_tiles.h"

namespace mk::MK_ISA {

// A chunk of tokens over a tile of slots, [token][lane]. Where R is 0 at and before a token, nothing is kept of it: of a register of
// lanes before `begins`, of the tile before `begin`.
template <class F>
struct Opened {
  static constexpr int kRegisters = int(kSlotTile<F> / kLanes<F>);
  F *scaled, *rest, *gate;  // a R; R, of a sigmoid R (1 - a), the factor of dS; a, of a softmax as `open` reads it
  int64_t begins[kRegisters] = {};
  int64_t begin = 0;

  explicit Opened(Arena& arena)
      : scaled(arena.take<F>(kChunkTokens * kSlotTile<F>)),
        rest(arena.take<F>(kChunkTokens * kSlotTile<F>)),
        gate(arena.take<F>(kChunkTokens * kSlotTile<F>)) {}

  // From scores in `scaled`. R: behind the chunk, then before it. `forgets`: tokens without a trace are left out.
  void open_gates(Gate kind, const TokenChunk<F>& c, const KeyLanes<F>& lanes, F e, bool forgets, F* R) {
    constexpr int W = kLanes<F>;
    begin = forgets ? c.n : 0;
    for (int64_t l = 0; l < lanes.L; l += W) {
      int64_t& from = begins[l / W];
      const Vec<F> m = load<F>(lanes.mask + l);
      Vec<F> r = load<F>(R + l), a, keep;
      from = 0;
      for (int64_t t = c.n; t-- > 0;) {
        const int64_t x = t * lanes.L + l;
        if (forgets && !any<F>(r != F(0))) {
          from = t + 1;
          break;
        }
        const Vec<F> s = load<F>(scaled + x);
        open<F>(kind, s, m, a, keep);
        store<F>(rest + x, kind == Gate::sigmoid ? r * keep : r);
        store<F>(gate + x, kind == Gate::softmax ? s : a);
        store<F>(scaled + x, a * r);
        r *= left<F>(a, keep, e);
      }
      store<F>(R + l, r);
      begin = least(begin, from);
    }
  }
};

}  // namespace mk::MK_ISA
