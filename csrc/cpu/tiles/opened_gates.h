// The gates of a chunk of tokens and their suffix products, as the backward of gated_write stores them.
#pragma once

#include "cpu/tiles/write_tiles.h"

namespace mk::MK_ISA {

// A chunk of tokens over a tile of slots, [token][lane]. Tokens for which the suffix product R is 0 are not stored:
// those before `begins` in a register of lanes, those before `begin` in the whole tile.
template <class F>
struct Opened {
  static constexpr int kRegisters = int(kSlotTile<F> / kLanes<F>);
  // a R; R, or for a sigmoid R (1 - a), the factor of dS; a, or for a softmax the number that `open` reads
  F *scaled, *rest, *gate;
  int64_t begins[kRegisters] = {};
  int64_t begin = 0;

  explicit Opened(Arena& arena)
      : scaled(arena.take<F>(kChunkTokens * kSlotTile<F>)),
        rest(arena.take<F>(kChunkTokens * kSlotTile<F>)),
        gate(arena.take<F>(kChunkTokens * kSlotTile<F>)) {}

  // From scores in `scaled`. R holds the suffix product after the chunk, then the one before it. `forgets`: skips
  // tokens with R = 0.
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

  // Turns D = c [token][lane] of n tokens into dS, and adds it to dm [lane]. past [lane]: p before the chunk, then
  // after it. kept [lane]: g retained; delta [token]: of a softmax. Skipped tokens get zeros in rows that are stored.
  void to_gradients(Gate kind, int64_t n, const KeyLanes<F>& lanes, F e, const F* kept, const F* delta, F* D, F* past,
                    F* dm) const {
    constexpr int W = kLanes<F>;
    const int64_t L = lanes.L;
    F *A = scaled, *R = rest, *G = gate;
    for (int64_t l = 0; l < L; l += W) {
      for (int64_t x = begin * L + l; x < begins[l / W] * L; x += L) {
        store<F>(R + x, fill<F>(0)), store<F>(G + x, fill<F>(0)), store<F>(A + x, fill<F>(0));
      }
      const Vec<F> m = load<F>(lanes.mask + l), g = load<F>(kept + l);
      Vec<F> p = begin + begins[l / W] > 0 ? fill<F>(0) : load<F>(past + l), total = load<F>(dm + l);
      for (int64_t t = begin; t < n; ++t) {
        const int64_t x = t * L + l;
        Vec<F> a = load<F>(G + x), keep, ds;
        if (kind == Gate::softmax) open<F>(kind, a, m, a, keep);
        const Vec<F> moved = load<F>(D + x) - e * p, da = load<F>(R + x) * moved;
        if (kind == Gate::sigmoid) ds = a * (da - g);
        else if (kind == Gate::given) ds = da;
        else ds = a * (da - delta[t] - (keep > 0 ? g / keep : fill<F>(0)));
        p += a * moved;  // (1 - e a) p + a c
        total += ds;
        store<F>(D + x, ds);
      }
      store<F>(past + l, p);
      store<F>(dm + l, total);
    }
  }
};

}  // namespace mk::MK_ISA
