// What a block of the gradients of a write keeps in shared memory beside rows: its position in the call, its tokens and
// slots, and what is known of them.
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
  Rows gates;                                 // given gates
  float* new_deltas;                          // the result of Of::deltas
  float* partial;              // [splits][rows of all batches][width], then [splits][rows] of dmask; null: one range
  int64_t rows, others;        // of a batch
  int64_t tiles;               // of this side
  int64_t splits, split_rows;  // of the other side
  int64_t width;               // of the result
  int blocks;                  // of its columns
  int key_parts, value_parts;
  int key_pitch, value_pitch;           // of rows that stay in shared memory
  int key_step, value_step, gate_step;  // of rows that are loaded in parts
  int buffer_bytes;
  bool held;  // the rows of this side stay in shared memory
  Of of;
};

// S: rows of a tile of the other side.
template <class X>
constexpr int kOthers = sizeof(X) == 4 ? 16 : 32;

// Slots of a tile, in shared memory.
template <int R>
struct Slots {
  const char *keys[R], *upper[R];  // null: not open
  float added[R], faded[R];        // the mask's term; d retained * retained
};

template <int S, bool by_slots>
struct alignas(16) Shared {
  static constexpr int kSlots = by_slots ? kRows : S, kTokens = by_slots ? S : kRows;
  static constexpr int kMeetings = by_slots ? 1 : kRows / kBorder;  // groups of 16 tokens with kept numbers, per tile
  int64_t batch, row0, split, begin, end;                           // begin, end: of the range of the other side
  int block;                                                        // of columns
  Bases bases;
  Tokens<kTokens> tokens[by_slots ? 2 : 1];  // two: this tile and the next
  float delta[by_slots ? 2 : 1][kTokens];
  Slots<kSlots> slots[by_slots ? 1 : 2];
  float left[2][kMeetings * kSlots],
      share[2][kMeetings * kSlots];  // R after the tokens of a warp or tile, p before them
};

// Finds the block's position in the call, and the tensors of its batch. Ends with a barrier.
template <int S, bool by_slots>
MK_DEVICE void locate(Shared<S, by_slots>& block, const Tiling& r) {
  if (threadIdx.x == 0) {
    int64_t at = blockIdx.x;
    block.split = at % r.splits;
    at /= r.splits;
    block.block = int(at % r.blocks);
    at /= r.blocks;
    block.row0 = at % r.tiles * kRows, block.batch = at / r.tiles;
    block.begin = block.split * r.split_rows, block.end = least(r.others, block.begin + r.split_rows);
  }
  __syncthreads();
  find_bases(block.bases, r.views, r.w.pairs.lead, block.batch);
  __syncthreads();
}

// Threads below R: look up the slots from `first` on.
template <int R>
MK_DEVICE void look_up(Slots<R>& slots, const Tiling& g, const Bases& bases, int64_t first) {
  const int r = opaque(int(threadIdx.x));
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

// Threads below R: look up the deltas of the tokens from t0 on.
template <int R>
MK_DEVICE void look_up(float (&delta)[R], const Tiling& g, int64_t batch, int64_t t0) {
  const int r = opaque(int(threadIdx.x));
  if (r >= R) return;
  const int64_t t = t0 + r;
  delta[r] = g.deltas != nullptr && t < g.tokens ? g.deltas[batch * g.tokens + t] : 0.f;
}

// Looks up the 64 rows of this side.
template <int S, bool by_slots>
MK_DEVICE void look_up_own(Shared<S, by_slots>& block, const Tiling& r) {
  if constexpr (by_slots) {
    look_up(block.slots[0], r, block.bases, block.row0);
  } else {
    look_up(block.tokens[0], r.w, r.views, block.bases, block.batch, block.row0);
    look_up(block.delta[0], r, block.batch, block.row0);
  }
}

// Looks up the tile of the other side that begins at `other`, into place n of two, and the numbers that are kept for
// its pairs: R after groups of 16 tokens, and p before them.
template <int S, bool by_slots>
MK_DEVICE void look_up(Shared<S, by_slots>& block, const Tiling& r, int n, int64_t other) {
  using Block = Shared<S, by_slots>;

  const int64_t t0 = by_slots ? other : block.row0, i0 = by_slots ? block.row0 : other, N = r.w.pairs.N;
  if constexpr (by_slots) {
    look_up(block.tokens[n], r.w, r.views, block.bases, block.batch, t0);
    look_up(block.delta[n], r, block.batch, t0);
  } else {
    look_up(block.slots[n], r, block.bases, i0);
  }
  if (r.of == Of::maps) return;
  for (int at = opaque(int(threadIdx.x)); at < Block::kMeetings * Block::kSlots; at += kThreads) {
    const int64_t i = i0 + at % Block::kSlots, border = t0 / kBorder + at / Block::kSlots;
    const int64_t last = by_slots ? border + S / kBorder - 1 : border;
    auto number = [&](const float* x, int64_t at) { return x[(block.batch * r.borders + at) * N + i]; };
    block.left[n][at] = i < N && last < r.borders ? number(r.lefts, last) : 1.f;
    block.share[n][at] = i < N && border < r.borders ? number(r.shares, border) : 0.f;
  }
}

}  // namespace
}  // namespace mk::cuda
