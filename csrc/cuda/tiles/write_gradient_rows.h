// What a block of the gradients of a write keeps in shared memory beside rows: which tokens and slots it has, and what is known of them.
#pragma once

#include "cuda/tiles/write_gradients.h"

namespace mk::cuda {
namespace {

struct Tiling {
  Writing w;
  Views views;
  View result, d_mask, retained, d_retained;
  float *lefts, *shares;  // as in Gradients
  const int* firsts;
  int64_t tokens, borders;
  const float* deltas;
  Rows own_keyed, own_valued, keyed, valued;  // rows with K and with V columns, of this side and of the other
  Rows gates;                                 // that are given
  float* new_deltas;                          // of Of::deltas
  float* partial;              // [splits][rows of all batches][width], then [splits][rows] of dmask; null: one range
  int64_t rows, others;        // of a batch
  int64_t tiles;               // of this side
  int64_t splits, split_rows;  // of the other side
  int64_t width;               // of the result
  int blocks;                  // of its columns
  int key_parts, value_parts;
  int key_pitch, value_pitch;           // of rows that stay
  int key_step, value_step, gate_step;  // of those that arrive in parts
  int buffer_bytes;
  bool held;  // the rows of this side stay
  Of of;
};

template <class X>
constexpr int kOthers = sizeof(X) == 4 ? 16 : 32;

// Slots of a tile, in shared memory.
template <int R>
struct Slots {
  const char *keys[R], *upper[R];  // null: not open
  float added[R], faded[R];        // what the mask adds; d retained * retained
};

template <int S, bool by_slots>
struct alignas(16) Shared {
  static constexpr int kSlots = by_slots ? kRows : S, kTokens = by_slots ? S : kRows;
  static constexpr int kMeetings = by_slots ? 1 : kRows / kBorder;  // of slots with borders, per tile
  int64_t batch, row0, split, begin, end;                           // begin, end: of the range of the other side
  int block;                                                        // of columns
  Bases bases;
  Tokens<kTokens> tokens[by_slots ? 2 : 1];  // of two: this tile and the next
  float delta[by_slots ? 2 : 1][kTokens];
  Slots<kSlots> slots[by_slots ? 1 : 2];
  float left[2][kMeetings * kSlots],
      share[2][kMeetings * kSlots];  // R behind the tokens of a warp or tile, p before them
};

// What tokens do to the share of a slot that was there before them.
struct Map {
  float keep = 1, add = 0;
};
MK_DEVICE Map then(const Map& earlier, const Map& later) {
  return {later.keep * earlier.keep, later.keep * earlier.add + later.add};
}
// Meets the lane across `bit`. all: of the lanes met so far; before: of those with earlier tokens; after: keep of those with later ones.
MK_DEVICE void meet(int lane, int bit, Map& all, Map& before, float& after) {
  const Map other{__shfl_xor_sync(kAllLanes, all.keep, bit), __shfl_xor_sync(kAllLanes, all.add, bit)};
  const bool later = (lane & bit) != 0;
  if (later) before = then(other, before);
  else after *= other.keep;
  all = then(later ? other : all, later ? all : other);
}

template <int R>
MK_DEVICE void look_up(Slots<R>& slots, const Tiling& g, const Bases& bases, int64_t first) {
  const int r = int(threadIdx.x);
  if (r >= R) return;
  const Pairs& p = g.w.pairs;
  const int64_t i = first + r;
  const float added = added_to(p, bases.of[kMask], i);
  const bool open = added != -kInfinity;
  slots.added[r] = added, slots.faded[r] = 0;
  slots.keys[r] = open ? bases.of[kKeys] + i * p.keys.row : nullptr;
  slots.upper[r] = open ? bases.of[kUpper] + i * g.views.of[kUpper].row : nullptr;
  if (open && g.d_retained) {
    slots.faded[r] = load(bases.of[kDRetained] + i * g.d_retained.row, DType::f32, 0) *
                     load(bases.of[kRetained] + i * g.retained.row, DType::f32, 0);
  }
}

// The tiles of tokens and slots that begin there, into place `n` of two; `borders`: how many meetings of 16 tokens a tile has.
template <int S, bool by_slots>
MK_DEVICE void look_up(Shared<S, by_slots>& block, const Tiling& r, int n, int64_t other) {
  using Block = Shared<S, by_slots>;

  const int64_t t0 = by_slots ? other : block.row0, i0 = by_slots ? block.row0 : other, N = r.w.pairs.N;
  if constexpr (by_slots) {
    look_up(block.tokens[n], r.w, r.views, block.bases, block.batch, t0);
    if (int(threadIdx.x) < S) {
      const int64_t t = t0 + threadIdx.x;
      block.delta[n][threadIdx.x] = r.deltas != nullptr && t < r.tokens ? r.deltas[block.batch * r.tokens + t] : 0.f;
    }
  } else {
    look_up(block.slots[n], r, block.bases, i0);
  }
  if (r.of == Of::maps) return;
  for (int at = int(threadIdx.x); at < Block::kMeetings * Block::kSlots; at += kThreads) {
    const int64_t i = i0 + at % Block::kSlots, border = t0 / kBorder + at / Block::kSlots;
    const int64_t last = by_slots ? border + S / kBorder - 1 : border;
    auto number = [&](const float* x, int64_t at) { return x[(block.batch * r.borders + at) * N + i]; };
    block.left[n][at] = i < N && last < r.borders ? number(r.lefts, last) : 1.f;
    block.share[n][at] = i < N && border < r.borders ? number(r.shares, border) : 0.f;
  }
}

}  // namespace
}  // namespace mk::cuda
