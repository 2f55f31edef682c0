// The sides of the gradients of softmax_read in tiles (gradient_tiles.h): where a block is in its call, the rows of
// both sides, and the ranges of slots of tokens.
#pragma once

#include "cuda/tiles/buffers.h"
#include "cuda/tiles/read_ranges.h"
#include "cuda/tiles/slot_ranges.h"

namespace mk::cuda {
namespace {

constexpr int kThreads = 128, kRows = 64, kColumns = 128;

enum class Of : int8_t { query, keys, values };

struct Tiling {
  SoftmaxReadBackward b;
  const float* terms;          // [batches][tokens]
  float* partial;              // [splits][rows of all batches][width], then [splits][rows] of dmask; null: one range
  int64_t rows, others;        // of a batch: of this side, and of the other side
  int64_t tiles;               // of this side, per batch
  int64_t splits, split_rows;  // of the other side
  int blocks;                  // of columns
  int key_parts, value_parts;  // of rows with K and with V columns
  int key_pitch, value_pitch;  // of rows of this side
  int key_step, value_step;    // of rows of the other side, which are loaded in parts
  int buffer_bytes;
  bool query_packs, key_packs, value_packs, read_packs;
  int ranges_at;           // bytes of shared memory in front of the ranges of tokens; 0: there are none
  const SlotRange* spans;  // of the tiles of tokens, [batches][tiles], if they are the other side
};

// S: small enough that two blocks fit the shared memory of an SM if rows have 128 columns.
template <class X, class W, Of of>
constexpr int kTile = of == Of::values ? 128 / int(sizeof(X))
                      : sizeof(X) == 4 ? 16
                                       : 32;

// Rows of one side: query and dr of tokens, with lse, term and lse_rest; or keys and values of slots, with the mask's
// term.
template <int R>
struct Rows {
  const char *first[R], *second[R];  // null: beyond the last, or an empty slot
  float a[R], b[R], c[R];
};

template <int S>
struct alignas(16) Shared {
  int64_t batch, row0, split;
  int64_t begin;  // of the range of the other side
  int tiles;      // in that range
  int block;      // of columns
  Rows<kRows> own;
  Rows<S> tile[2];  // this one and the next
};

// Threads below R: look up the rows from `from` on.
template <bool tokens, int R>
MK_DEVICE void look_up(Rows<R>& rows, const Tiling& g, int64_t batch, int64_t from) {
  const int r = opaque(int(threadIdx.x));
  if (r >= R) return;
  const SoftmaxRead& p = g.b.forward;
  const int64_t at = from + r;
  rows.first[r] = rows.second[r] = nullptr;
  if constexpr (tokens) {
    const int64_t all = p.lead.folded() * p.T;
    rows.a[r] = -kInfinity, rows.b[r] = rows.c[r] = 0;
    if (at >= all) return;
    auto row_of = [&](const View& v) { return token_row(v, p.lead, v.batch(p.lead, batch), p.T, at); };
    rows.first[r] = row_of(p.query), rows.second[r] = row_of(g.b.d_read);
    rows.a[r] = *reinterpret_cast<const float*>(row_of(p.lse)), rows.b[r] = g.terms[batch * all + at];
    rows.c[r] = *reinterpret_cast<const float*>(row_of(p.lse_rest));
  } else {
    rows.a[r] = at < p.N ? mask_at(p.mask, p.mask ? p.mask.batch(p.lead, batch) : nullptr, at) : -kInfinity;
    if (rows.a[r] == -kInfinity) return;
    rows.first[r] = p.keys.batch(p.lead, batch) + at * p.keys.row;
    rows.second[r] = p.values.batch(p.lead, batch) + at * p.values.row;
  }
}

// Thread 0: finds the block's position in the call. Ends with a barrier.
template <int S>
MK_DEVICE void locate(Shared<S>& block, const Tiling& g) {
  if (threadIdx.x == 0) {
    int64_t at = blockIdx.x;
    block.split = at % g.splits;
    at /= g.splits;
    block.block = int(at % g.blocks);
    at /= g.blocks;
    block.row0 = at % g.tiles * kRows, block.batch = at / g.tiles;
    block.begin = block.split * g.split_rows;
    block.tiles = int(div_up(least(g.others - block.begin, g.split_rows), S));
  }
  __syncthreads();
}

// The ranges of tokens in shared memory: those of this side [64], or of the tiles of the other side [2][S].
template <Of of, int S>
struct TokenRanges {
  int at;  // Tiling::ranges_at
  MK_DEVICE bool given() const { return at != 0; }
  MK_DEVICE SlotRange* of_tile(int turn) const {
    return reinterpret_cast<SlotRange*>(shared_memory() + at) + (of == Of::query ? 0 : turn * S);
  }

  // Threads below R: look up the ranges of the tokens from `from` on.
  template <int R>
  MK_DEVICE void look_up(const Tiling& g, int64_t batch, int64_t from, int turn) const {
    const int r = opaque(int(threadIdx.x));
    const SoftmaxRead& p = g.b.forward;
    if (given() && r < R) of_tile(turn)[r] = range_of(p.range, p.lead, batch, p.T, from + r, p.N);
  }
};

// All threads: looks up the ranges of the tokens of this side, if there are any, and leaves of the range of slots the
// tiles that some of them may address.
template <int S>
MK_DEVICE void narrow(Shared<S>& block, TokenRanges<Of::query, S> ranges, const Tiling& g) {
  if (!ranges.given()) return;
  ranges.template look_up<kRows>(g, block.batch, block.row0, 0);
  __syncthreads();
  if (threadIdx.x == 0) {
    const SlotRange span = span_of(ranges.of_tile(0), kRows);
    const int64_t end = least(block.begin + block.tiles * int64_t(S), span.stop);
    block.begin = most(block.begin, span.first / S * S);
    block.tiles = int(div_up(most(0, end - block.begin), S));
  }
  __syncthreads();
}

}  // namespace
}  // namespace mk::cuda
