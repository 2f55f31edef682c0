// Tiles of gates, for the writes: a[t, i] of 32 tokens and 32 slots, by the tiles of pairs.h. They are 1 / (1 + exp(-s[t, i])), a
// softmax of the scores of a token, or given as weights.
#pragma once

#include "cuda/tiles/device.h"
#include "cuda/tiles/pair_tiles.h"
#include "params/gated_write.h"

namespace mk::cuda {

// What the kernels of a write take. `erase` is the vector e_t; without it, e_t = erase_scale.
struct Writing {
  Pairs pairs;
  View write, erase, token_mask;
  float erase_scale;
  const SoftmaxRow<float>* softmax;  // of all tokens of all batches; null: the gates are no softmax

  // May tokens be left out of the gradients of slots where no trace of them is left? (why: cpu/gated_write_backward.cpp)
  MK_DEVICE bool forgets() const {
    return !pairs.weights && softmax == nullptr && erase_scale >= 0 && erase_scale <= 1;
  }
};

// The op that a launch belongs to.
inline const char* name_of(const GatedWrite& g) {
  return g.gate == Gate::given ? "slot_write" : g.gate == Gate::softmax ? "softmax_write" : "gated_write";
}

// What makes the scores of every token a softmax, a_i = exp(s_i - top) * inverse, in scratch memory. (softmax_write.cu)
const SoftmaxRow<float>* softmax_rows(const Device& device, const char* name, const Pairs& p);

inline Writing writing_of(const Device& device, const char* name, const GatedWrite& g) {
  Writing w{};
  Pairs& p = w.pairs;
  p.lead = g.lead, p.T = g.T, p.N = g.N, p.K = g.K, p.V = g.V, p.scale = g.scale;
  p.query = g.query, p.keys = g.keys, p.values = g.values, p.mask = g.mask, p.weights = g.weights;
  w.write = g.write, w.erase = g.erase, w.token_mask = g.token_mask, w.erase_scale = float(g.erase_scale);
  if (g.gate == Gate::softmax) w.softmax = softmax_rows(device, name, p);
  return w;
}

struct GateTile {
  Tile pairs;                     // after open_gates w[t][i] is a, ds[t][i] is 1 - a
  const char* erase_rows[kTile];  // of tokens that write
  bool open[kTile];               // not an empty slot, nor beyond the last one
};

// 1 - e a without cancellation where e is 1; `keep` is 1 - a.
MK_DEVICE float left_by(float a, float keep, float e) { return e == 1 ? keep : 1 - e * a; }

// a and 1 - a of slot i. Of the largest gate of a token the sum of the others is known, and 1 - a is that sum: a difference would
// cancel where the gate is near 1.
MK_DEVICE void soften(const SoftmaxRow<float>& row, float s, int64_t i, float& a, float& keep) {
  if (i == row.slot && row.left < 0.5f) {
    a = 1 - row.left, keep = row.left;
  } else {
    a = weight_of(s - row.top) * row.inverse, keep = 1 - a;
  }
}

// ds of a gate from its da. faded: d retained * retained of the slot; delta: sum_i a da of the token, for a softmax.
MK_DEVICE float score_gradient(const Writing& w, float a, float keep, float da, float faded, float delta) {
  if (w.pairs.weights) return da;
  if (w.softmax == nullptr) return da * a * keep - faded * a;
  // A gate of 1 has taken all: `faded` is 0 with it.
  return a * (da - (keep > 0 ? quotient(faded, keep) : 0.f) - delta);
}

// Once per tile of slots; a barrier must follow.
MK_DEVICE void find_open(GateTile& tile, const Writing& w, int64_t batch, int64_t i0) {
  const Pairs& p = w.pairs;
  if (int(threadIdx.x) >= kTile) return;
  const int64_t i = i0 + threadIdx.x;
  tile.open[threadIdx.x] = i < p.N && mask_at(p.mask, p.mask ? p.mask.batch(p.lead, batch) : nullptr, i) != -kInfinity;
}

// Points a_rows at rows of tokens that write and b_rows at rows of open slots, where asked for; null for all others.
MK_DEVICE void point_open(GateTile& tile, const Writing& w, int64_t batch, const View& tokens, int64_t t0,
                          const View* slots, int64_t i0) {
  const Pairs& p = w.pairs;
  __syncthreads();  // the rows of before are no longer used
  const int row = int(threadIdx.x);
  if (row < kTile) {
    const int64_t t = t0 + row;
    bool writes = t < p.lead.folded() * p.T;
    auto row_of = [&](const View& v) -> char* {
      return v && writes ? token_row(v, p.lead, v.batch(p.lead, batch), p.T, t) : nullptr;
    };
    if (const char* mask = row_of(w.token_mask); mask != nullptr) writes = *mask != 0;
    tile.pairs.a_rows[row] = row_of(tokens);
    tile.erase_rows[row] = row_of(w.erase), tile.pairs.weights[row] = row_of(p.weights);
    tile.pairs.b_rows[row] =
        slots != nullptr && tile.open[row] ? slots->batch(p.lead, batch) + (i0 + row) * slots->row : nullptr;
  }
  __syncthreads();
}

// The gates of tokens [t0, ...) on slots [i0, ...); 0 where a token does not write and on slots that are not open. Afterwards a_rows
// are those of `write`, b_rows those of `slots`. Ends with a barrier.
MK_DEVICE void open_gates(GateTile& tile, const Writing& w, int64_t batch, int64_t t0, int64_t i0, const View* slots) {
  const View& weights = w.pairs.weights;
  float s[2][4] = {};
  if (!weights) score_pairs(tile.pairs, w.pairs, batch, t0, i0, s);
  point_open(tile, w, batch, w.write, t0, slots, i0);
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const int row = int(threadIdx.x) / 8 + 16 * x;
    const bool writes = tile.pairs.a_rows[row] != nullptr;
#pragma unroll
    for (int y = 0; y < 4; ++y) {
      const int slot = int(threadIdx.x) % 8 + 8 * y;
      float a = 0, keep = 1;
      if (writes && tile.open[slot]) {
        if (weights) {
          a = load(tile.pairs.weights[row], weights.dtype, i0 + slot), keep = 1 - a;
        } else if (w.softmax != nullptr) {
          soften(w.softmax[batch * w.pairs.lead.folded() * w.pairs.T + t0 + row], s[x][y], i0 + slot, a, keep);
        } else {
          a = 1 / (1 + exponential(-s[x][y])), keep = 1 / (1 + exponential(s[x][y]));
        }
      }
      tile.pairs.w[row][slot] = a, tile.pairs.ds[row][slot] = keep;
    }
  }
  __syncthreads();
}

// Gradients of gates that are given: x[t][i] of slots from `first` on, into rows of tokens.
MK_DEVICE void store_gates(const float (&x)[kTile][kPitch], const Tile& rows, int64_t first, int64_t N) {
  for (int j = int(threadIdx.x); j < kTile * kTile; j += kPairThreads) {
    const int t = j / kTile, i = j % kTile;
    if (rows.a_rows[t] != nullptr && first + i < N) reinterpret_cast<float*>(rows.a_rows[t])[first + i] = x[t][i];
  }
}

}  // namespace mk::cuda
