// Gradients of a write with a number as erase (formulas: gated_write_backward.cu): products on the tensor cores.
//
// One kernel for all passes over pairs. The side of the result, slots or tokens, is "this side", the side that is
// walked is "the other side". A warp has 16 of the block's 64 rows of this side, and up to 128 columns of the result in
// registers. Per tile of S rows of the other side a warp does
//   score     x = <q, k>, c = <w, d_out>                       [16, S], products along K and V
//   weigh     x: gates, then weights or gradients of scores    [16, S], scans along the tokens
//   multiply  acc += x times the rows of the other side        [16, columns]
// all in registers.
//
// Tokens change the share of a slot by maps p -> keep p + add. A scan composes the maps of neighbouring tokens by
// shuffles: of 4 lanes if slots are rows, of 8 if tokens are. An earlier pass (Of::maps) has composed the maps of every
// 16 tokens in scratch memory, so a tile needs no other one.
#pragma once

#include "cuda/tiles/write_gradient_loader.h"

namespace mk::cuda {
namespace {

// The map p -> keep p + add, by which tokens change the share of a slot.
struct Map {
  float keep = 1, add = 0;
};
MK_DEVICE Map then(const Map& earlier, const Map& later) {
  return {later.keep * earlier.keep, later.keep * earlier.add + later.add};
}
// Composes maps with the lane across `bit`. all: the map of the lanes so far; before: of those with earlier tokens;
// after: `keep` of those with later tokens.
MK_DEVICE void meet(int lane, int bit, Map& all, Map& before, float& after) {
  const Map other{__shfl_xor_sync(kAllLanes, all.keep, bit), __shfl_xor_sync(kAllLanes, all.add, bit)};
  const bool later = (lane & bit) != 0;
  if (later) before = then(other, before);
  else after *= other.keep;
  all = then(later ? other : all, later ? all : other);
}

// The pairs of a tile that a lane has: x[j][i] of [S / 8][4] is in row row(i) of the block and in column column(j, i)
// of the tile.
template <bool by_slots>
struct Places {
  int lane = opaque(int(threadIdx.x)) % 32;
  int own = opaque(int(threadIdx.x)) / 32 * 16 + lane / 4;  // the first row; the second is 8 further on

  MK_DEVICE int row(int i) const { return own + i / 2 * 8; }
  MK_DEVICE int column(int j, int i) const { return j * 8 + lane % 4 * 2 + i % 2; }
  MK_DEVICE int token(int j, int i) const { return by_slots ? column(j, i) : row(i); }
  MK_DEVICE int slot(int j, int i) const { return by_slots ? row(i) : column(j, i); }
};

// sums [16, S] += products of a warp's 16 rows and S rows of the other side along the columns of a part.
template <class M, bool by_slots, int S>
MK_DEVICE void add_part(Sums<M> (&sums)[S / 8], const Loader<M, by_slots>& loader, const char* buffer, int part) {
  using X = Stored<M>;
  const Tiling& r = loader.r;
  const int warp = opaque(int(threadIdx.x)) / 32;  // found again: kept, it spills on sm_120
  const bool values = loader.is_valued(part);
  const int64_t at = loader.column_of(part), width = values ? r.w.pairs.V : r.w.pairs.K;
  const int step = values ? r.value_step : r.key_step, pitch = values ? r.value_pitch : r.key_pitch;
  const char* own =
      r.held ? (values ? loader.valued : loader.keyed) + warp * 16 * pitch : buffer + (S + warp * 16) * step;
  add_products<M, S>(sums, own, r.held ? pitch : step, r.held ? int(at * sizeof(X)) : 0, buffer, step,
                     int(least(kColumns, width - at) * int64_t(sizeof(X))));
}

// x = <q, k>, or the given gates, and c = <w, d_out> of a warp's 16 rows and this tile: [16, S]. dw needs no c, which
// stays 0. Returns the part that came last.
template <class M, bool by_slots, int S>
MK_DEVICE const char* multiply_pairs(float (&x)[S / 8][4], float (&c)[S / 8][4], Loader<M, by_slots>& loader,
                                     const Places<by_slots>& at, bool busy) {
  using X = Stored<M>;
  const Tiling& r = loader.r;
  const char* buffer = nullptr;
  Sums<M> sums[S / 8];
  for (int part = 0; part < loader.parts; ++part) {
    buffer = loader.arrived(part);
    if (part == loader.before && loader.before > 0) {
#pragma unroll
      for (int j = 0; j < S / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[j][i] = sums[j][i];
        sums[j] = {};
      }
    }
    if (!busy || part == loader.before + r.key_parts) continue;
    if (!loader.given || part < loader.before) {
      add_part<M, by_slots, S>(sums, loader, buffer, part);
      continue;
    }
#pragma unroll
    for (int i = 0; i < S / 2; ++i) {
      const char* row = buffer + at.token(i / 4, i % 4) * r.gate_step;
      sums[i / 4].x[i % 4] = to_float(reinterpret_cast<const X*>(row)[at.slot(i / 4, i % 4)]);
    }
  }
#pragma unroll
  for (int i = 0; i < S / 2; ++i) x[i / 4][i % 4] = sums[i / 4][i % 4];
  return buffer;
}

// Turns x = <q, k> [16, S] into gates a, then, by scans along the tokens, into weights a R for dw, else into ds, and
// adds the rows of ds to `total`. R: the suffix product of 1 - e a over later tokens. From c [16, S] it subtracts e
// times the share of the slot before the token.
template <class M, bool by_slots>
struct Scan {
  static constexpr int S = kOthers<Stored<M>>;
  using Block = Shared<S, by_slots>;

  const Tiling& r;
  const Block& block;
  const Tokens<Block::kTokens>& tokens;
  const Slots<Block::kSlots>& slots;
  const Places<by_slots>& at;
  Gates gates;
  int64_t other;
  int n;  // which of two places in shared memory the tile has
  float (&x)[S / 8][4], (&c)[S / 8][4], (&total)[2];

  MK_DEVICE void run() const {
    to_gates<S>(
        x, r.w, tokens, by_slots ? block.row0 : other, [&](int j, int i) { return at.token(j, i); },
        [&](int j, int i) { return at.slot(j, i); }, [&](int j, int i) { return slots.added[at.slot(j, i)]; });
    if constexpr (by_slots) {
#pragma unroll
      for (int row = 0; row < 2; ++row) scan_row(row);
    } else {
#pragma unroll
      for (int i = 0; i < S / 4; ++i) scan_column(i / 2, i % 2);
    }
  }

  MK_DEVICE Map map_of(int j, int i) const {
    const float a = gates.open(x[j][i]);
    return {left_by(a, gates.keep(x[j][i]), r.w.erase_scale), a * c[j][i]};
  }

  // Subtracts e times the share before the token from c.
  MK_DEVICE void share_out(int j, int i, float share) const { c[j][i] -= r.w.erase_scale * share; }

  // left: R of the token.
  MK_DEVICE void finish(int j, int i, float left) const {
    const float a = gates.open(x[j][i]), keep = gates.keep(x[j][i]);
    if (r.of == Of::write) {
      x[j][i] = a * left;
      return;
    }
    const int token = at.token(j, i), slot = at.slot(j, i);
    const bool closed = slots.added[slot] == -kInfinity || !tokens.writes[token];
    const float ds =
        score_gradient(r.w, a, keep, left * c[j][i], slots.faded[slot], block.delta[by_slots ? n : 0][token]);
    x[j][i] = closed ? 0.f : ds;
    total[i / 2] += x[j][i];
  }

  // Slots are rows. The S tokens of a slot are columns, which four neighbouring lanes share in pairs.
  MK_DEVICE void scan_row(int row) const {
    float left = block.left[n][at.row(2 * row)], share = block.share[n][at.row(2 * row)];
    Map run;
#pragma unroll
    for (int j = 0; j < S / 8; ++j) {
      const Map first = map_of(j, 2 * row);
      Map all = then(first, map_of(j, 2 * row + 1)), before;
      float after = 1;
      meet(at.lane, 1, all, before, after);
      meet(at.lane, 2, all, before, after);
      const float here = before.keep * share + before.add;
      share_out(j, 2 * row, here);
      share_out(j, 2 * row + 1, first.keep * here + first.add);
      share = all.keep * share + all.add;
      run = j % 2 == 0 ? all : then(run, all);
      if (j % 2 == 1) store_map(row, other / kBorder + j / 2, run);
    }
#pragma unroll
    for (int j = S / 8; j-- > 0;) {
      float r0, r1;
      x[j][2 * row] = opaque(x[j][2 * row]), x[j][2 * row + 1] = opaque(x[j][2 * row + 1]);
      leave(at.lane, map_of(j, 2 * row).keep, map_of(j, 2 * row + 1).keep, left, r0, r1);
      finish(j, 2 * row, r0), finish(j, 2 * row + 1, r1);
    }
  }

  // Of::maps stores the map of 16 tokens.
  MK_DEVICE void store_map(int row, int64_t border, const Map& map) const {
    const int64_t i = block.row0 + at.row(2 * row);
    if (r.of != Of::maps || at.lane % 4 != 0 || i >= r.w.pairs.N || border >= r.borders) return;
    const int64_t place = (block.batch * r.borders + border) * r.w.pairs.N + i;
    r.lefts[place] = map.keep, r.shares[place] = map.add;
  }

  // Tokens are rows. Of the 16 tokens of a warp on one slot, eight lanes have two each, 8 rows apart.
  MK_DEVICE void scan_column(int j, int i) const {
    Map low = map_of(j, i), high = map_of(j, i + 2), before_low, before_high;
    float after_low = 1, after_high = 1;
#pragma unroll
    for (int bit = 4; bit < 32; bit *= 2) {
      meet(at.lane, bit, low, before_low, after_low);
      meet(at.lane, bit, high, before_high, after_high);
    }
    const int place = at.own / kBorder * S + at.column(j, i);
    const float left = block.left[n][place], share = block.share[n][place];
    const float behind_low = low.keep * share + low.add;
    share_out(j, i, before_low.keep * share + before_low.add);
    share_out(j, i + 2, before_high.keep * behind_low + before_high.add);
    finish(j, i, left * (high.keep * after_low));
    finish(j, i + 2, left * after_high);
  }
};

// Stores x [16, S], the gradient of given gates: rows of tokens, slots from `other` on.
template <int S, class Block, class Places>
MK_DEVICE void store_weights(const Tiling& r, const Block& block, const Places& at, int64_t other,
                             const float (&x)[S / 8][4]) {
  const Pairs& p = r.w.pairs;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int64_t t = block.row0 + at.row(2 * row);
    if (t >= r.tokens) continue;
    auto* out = reinterpret_cast<float*>(token_row(r.result, p.lead, r.result.batch(p.lead, block.batch), p.T, t));
#pragma unroll
    for (int i = 0; i < S / 4; ++i) {
      const int64_t column = other + at.column(i / 2, i % 2);
      if (column < p.N) out[column] = x[i / 2][2 * row + i % 2];
    }
  }
}

// Stores this lane's two rows of the result [columns], and of dmask or the deltas; if there are several ranges, their
// part of this range.
template <bool by_slots, int S>
MK_DEVICE void store_sums(const Tiling& r, const Shared<S, by_slots>& block, const float (&acc)[kColumns / 8][4],
                          float (&total)[2]) {
  const Pairs& p = r.w.pairs;
  const View& result = r.result;
  const int lane = int(threadIdx.x) % 32, own = int(threadIdx.x) / 32 * 16 + lane / 4;
  const int64_t column0 = int64_t(block.block) * kColumns, batch = block.batch;
  const float factor = r.of == Of::write ? 1.f : float(p.scale);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    total[row] += __shfl_xor_sync(kAllLanes, total[row], 1);
    total[row] += __shfl_xor_sync(kAllLanes, total[row], 2);
    const int64_t at = block.row0 + own + row * 8, all = p.lead.batches() * r.rows;
    if (at >= r.rows || r.of == Of::maps || r.of == Of::weights) continue;
    float *out = nullptr, *sum = nullptr;
    if (r.partial != nullptr) {
      const int64_t place = block.split * all + batch * r.rows + at;
      out = r.partial + place * r.width + column0;
      sum = r.partial + r.splits * all * r.width + place;
    } else {
      if (r.width > 0 && result) {
        char* base = result.batch(p.lead, batch);
        out = reinterpret_cast<float*>(by_slots ? base + at * result.row : token_row(result, p.lead, base, p.T, at)) +
              column0;
      }
      if (r.of == Of::deltas) sum = r.new_deltas + batch * r.rows + at;
      else if (r.d_mask) sum = reinterpret_cast<float*>(r.d_mask.batch(p.lead, batch) + at * r.d_mask.row);
    }
    if ((r.of == Of::keys || r.of == Of::deltas) && sum != nullptr && column0 == 0 && lane % 4 == 0) *sum = total[row];
    if (out == nullptr) continue;
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) {
      const int column = i / 2 * 8 + lane % 4 * 2 + i % 2;
      if (column0 + column < r.width) out[column] = factor * acc[i / 2][2 * row + i % 2];
    }
  }
}

template <class M, bool by_slots>
MK_KERNEL_BLOCKS(kThreads, 3)
sum_tiles(MK_PARAM(Tiling) r) {
  using X = Stored<M>;
  constexpr int S = kOthers<X>, kSteps = S * int(sizeof(X)) / 32;
  using Block = Shared<S, by_slots>;

  Block& block = *reinterpret_cast<Block*>(shared_memory());
  char *buffers = shared_memory() + sizeof(Block), *keyed = buffers + kBuffers * r.buffer_bytes;
  Loader<M, by_slots> loader{r, block, {buffers, r.buffer_bytes}, keyed, keyed + kRows * r.key_pitch};
  locate(block, r);
  look_up_own(block, r);
  loader.start();

  const bool busy = block.row0 + int(threadIdx.x) / 32 * 16 < r.rows;  // this warp has a row
  float acc[kColumns / 8][4] = {}, total[2] = {};
  for (; loader.other < block.end; loader.advance()) {
    const Places<by_slots> at;
    float x[S / 8][4], c[S / 8][4] = {};
    const char* buffer = multiply_pairs<M, by_slots, S>(x, c, loader, at, busy);
    if (!busy) continue;

    const Scan<M, by_slots> scan{r,
                                 block,
                                 block.tokens[by_slots ? loader.n : 0],
                                 block.slots[by_slots ? 0 : loader.n],
                                 at,
                                 {loader.given},
                                 loader.other,
                                 loader.n,
                                 x,
                                 c,
                                 total};
    scan.run();
    if (!by_slots && r.of == Of::weights) store_weights<S>(r, block, at, loader.other, x);
    if (r.of == Of::maps || r.of == Of::deltas || r.of == Of::weights) continue;

    float drop[2];
    lift_rows<M, S>(x, drop);
    Left<M> weights[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) weights[step] = weights_left<M>(x, step);
    add_weighted<M, kSteps, kColumns>(acc, weights, drop, buffer, r.of == Of::write ? r.value_step : r.key_step,
                                      r.width - int64_t(block.block) * kColumns, opaque(at.lane));
  }
  wait_copies<0>();
  store_sums(r, block, acc, total);
}

}  // namespace
}  // namespace mk::cuda
