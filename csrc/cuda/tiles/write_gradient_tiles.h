// Gradients of a write with a number as erase (formulas: gated_write_backward.cu), by products of tiles on the tensor cores.
//
// One kernel for all passes over pairs. Its four warps have 16 rows each of 64 slots, or of 64 tokens, and up to 128 columns of a
// result in registers; rows of the other side arrive S at a time, in parts of 128 columns that take turns in two buffers, one on its
// way by cp.async while the other is multiplied. The rows of this side stay in shared memory, or come again with every part where
// they are too wide. Products become gates, then weights or gradients of scores by scans along the tokens, all in registers, and
// the left side of the sum over the other side. The part that is summed arrives last, because it is used twice.
//
// A scan joins maps p -> keep p + add of neighbouring tokens by shuffles: of 4 lanes where slots are rows, of 8 where tokens are. What
// the maps of 16 tokens come to has been kept in scratch memory, so every tile is known by itself.
#pragma once

#include "cuda/tiles/write_gradient_rows.h"

namespace mk::cuda {
namespace {

template <class M, bool by_slots>
MK_KERNEL_BLOCKS(kThreads, 3)
sum_tiles(MK_PARAM(Tiling) r) {
  using X = Stored<M>;
  constexpr int S = kOthers<X>, kSteps = S * int(sizeof(X)) / 32;
  using Block = Shared<S, by_slots>;

  const Writing& w = r.w;
  const Pairs& p = w.pairs;
  const int tid = int(threadIdx.x), warp = tid / 32;
  const bool given = bool(p.weights);
  Block& block = *reinterpret_cast<Block*>(shared_memory());
  char* buffers = shared_memory() + sizeof(Block);
  char *keyed = buffers + kBuffers * r.buffer_bytes, *valued = keyed + kRows * r.key_pitch;  // the rows that stay
  if (tid == 0) {
    int64_t at = blockIdx.x;
    block.split = at % r.splits;
    at /= r.splits;
    block.block = int(at % r.blocks);
    at /= r.blocks;
    block.row0 = at % r.tiles * kRows, block.batch = at / r.tiles;
    block.begin = block.split * r.split_rows, block.end = least(r.others, block.begin + r.split_rows);
  }
  __syncthreads();
  find_bases(block.bases, r.views, p.lead, block.batch);
  __syncthreads();
  if constexpr (by_slots) {
    look_up(block.slots[0], r, block.bases, block.row0);
  } else {
    look_up(block.tokens[0], w, r.views, block.bases, block.batch, block.row0);
    const int64_t t = block.row0 + tid;
    if (tid < kRows) {
      block.delta[0][tid] = r.deltas != nullptr && t < r.tokens ? r.deltas[block.batch * r.tokens + t] : 0.f;
    }
  }
  // The first tile from `other` on in which a token of this block leaves a trace in a slot, or behind the last. Warps find it alike.
  auto next = [&](int64_t other) -> int64_t {
    if (r.of == Of::maps) return other;
    const int lane = opaque(int(threadIdx.x)) % 32;
    const int* firsts = r.firsts + block.batch * p.N;
    for (; other < block.end; other += S) {
      bool traced = false;
      if constexpr (by_slots) {
        for (int64_t i = block.row0 + lane; i < least(p.N, block.row0 + kRows); i += 32) {
          traced = traced || firsts[i] < (other + S) / kBorder;
        }
      } else {
        const int64_t i = other + lane;
        traced = lane < S && i < p.N && firsts[i] < (block.row0 + kRows) / kBorder;
      }
      if (__any_sync(kAllLanes, traced)) break;
    }
    return other;
  };
  int64_t other = next(block.begin), following = other;
  if (other < block.end) look_up(block, r, 0, other);
  __syncthreads();

  auto own_row = [&](bool of_values, int i) -> const char* {
    if constexpr (by_slots) return of_values ? block.slots[0].upper[i] : block.slots[0].keys[i];
    else return of_values ? block.tokens[0].write[i] : block.tokens[0].query[i];
  };
  const int before = r.of == Of::write ? 0 : r.value_parts;  // parts of values before those of keys
  const int parts = before + r.key_parts + (r.of == Of::write ? 1 : 0);
  if (r.held) {
    for (int v = 0; v < 2; ++v) {
      if (v == 0 ? given : before == 0) continue;
      ask_rows<X>(tid, kRows, r.views, v == 0 ? r.own_keyed : r.own_valued, 0, v == 0 ? p.K : p.V,
                  v == 0 ? keyed : valued, v == 0 ? r.key_pitch : r.value_pitch,
                  [&](int i) { return own_row(v != 0, i); });
    }
  }
  auto is_valued = [&](int part) { return part < before || part >= before + r.key_parts; };
  // The first column of a part; of keys the one that is summed comes last.
  auto column_of = [&](int part) -> int64_t {
    if (is_valued(part)) return int64_t(r.of == Of::write ? block.block : part) * kColumns;
    const int k = part - before + (r.of == Of::keys || r.of == Of::query ? 1 + block.block : 0);
    return int64_t(k < r.key_parts ? k : k - r.key_parts) * kColumns;
  };
  int turn = 0, n = 0;  // n: which of the two tiles
  auto ask = [&](int64_t other, int n, int part) {
    const int tid = opaque(int(threadIdx.x));
    const bool values = is_valued(part);
    char* buffer = buffers + turn * r.buffer_bytes;
    turn ^= 1;
    const int64_t at = column_of(part);
    const int step = values ? r.value_step : r.key_step;
    if (given && !values) {
      if constexpr (by_slots) {
        ask_rows<X>(tid, S, r.views, r.gates, block.row0, kRows, buffer, r.gate_step,
                    [&](int i) { return block.tokens[n].query[i]; });
      } else {
        ask_rows<X>(tid, kRows, r.views, r.gates, other, S, buffer, r.gate_step,
                    [&](int i) { return block.tokens[0].query[i]; });
      }
    } else {
      ask_rows<X>(tid, S, r.views, values ? r.valued : r.keyed, at, kColumns, buffer, step, [&](int i) -> const char* {
        if constexpr (by_slots) return values ? block.tokens[n].write[i] : block.tokens[n].query[i];
        else return values ? block.slots[n].upper[i] : block.slots[n].keys[i];
      });
      if (!r.held) {
        ask_rows<X>(tid, kRows, r.views, values ? r.own_valued : r.own_keyed, at, kColumns, buffer + S * step, step,
                    [&](int i) { return own_row(values, i); });
      }
    }
    commit_copies();
  };
  if (other < block.end) ask(other, 0, 0);

  const bool busy = block.row0 + warp * 16 < r.rows;  // this warp has a row
  const Gates gates{given};
  float acc[kColumns / 8][4] = {}, total[2] = {};
  for (; other < block.end; other = following, n ^= 1) {
    // Waits for a part of the tile, and asks for the one after it.
    auto arrived = [&](int part) -> const char* {
      wait_copies<0>();
      __syncthreads();
      const char* here = buffers + (turn ^ 1) * r.buffer_bytes;
      if (part == 0) {
        following = next(other + S);
        if (following < block.end) look_up(block, r, n ^ 1, following);
      }
      const bool last = part + 1 == parts;
      if (!last || following < block.end) ask(last ? following : other, last ? n ^ 1 : n, last ? 0 : part + 1);
      return here;
    };
    const char* buffer = nullptr;
    auto multiply = [&](Sums<M>(&sums)[S / 8], int part) {
      const bool values = is_valued(part);
      const int64_t at = column_of(part), width = values ? p.V : p.K;
      const int step = values ? r.value_step : r.key_step, pitch = values ? r.value_pitch : r.key_pitch;
      const char* own = r.held ? (values ? valued : keyed) + warp * 16 * pitch : buffer + (S + warp * 16) * step;
      add_products<M, S>(sums, own, r.held ? pitch : step, r.held ? int(at * sizeof(X)) : 0, buffer, step,
                         int(least(kColumns, width - at) * int64_t(sizeof(X))));
    };
    const int lane = opaque(int(threadIdx.x)) % 32, own = opaque(int(threadIdx.x)) / 32 * 16 + lane / 4;
    auto row_of = [&](int i) { return own + i / 2 * 8; };
    auto column_at = [&](int j, int i) { return j * 8 + lane % 4 * 2 + i % 2; };
    auto token = [&](int j, int i) { return by_slots ? column_at(j, i) : row_of(i); };
    auto slot = [&](int j, int i) { return by_slots ? row_of(i) : column_at(j, i); };
    float c[S / 8][4] = {}, x[S / 8][4];
    {
      Sums<M> sums[S / 8];
      for (int part = 0; part < parts; ++part) {
        buffer = arrived(part);
        if (part == before && before > 0) {
#pragma unroll
          for (int j = 0; j < S / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) c[j][i] = sums[j][i];
            sums[j] = {};
          }
        }
        if (!busy || part == before + r.key_parts) continue;
        if (!given || part < before) {
          multiply(sums, part);
          continue;
        }
#pragma unroll
        for (int i = 0; i < S / 2; ++i) {
          const char* row = buffer + token(i / 4, i % 4) * r.gate_step;
          sums[i / 4].x[i % 4] = to_float(reinterpret_cast<const X*>(row)[slot(i / 4, i % 4)]);
        }
      }
#pragma unroll
      for (int i = 0; i < S / 2; ++i) x[i / 4][i % 4] = sums[i / 4][i % 4];
    }
    const Tokens<Block::kTokens>& tokens = block.tokens[by_slots ? n : 0];
    const Slots<Block::kSlots>& slots = block.slots[by_slots ? 0 : n];
    if (busy) {
      to_gates<S>(x, w, tokens, by_slots ? block.row0 : other, token, slot,
                  [&](int j, int i) { return slots.added[slot(j, i)]; });
    }
    auto map_of = [&](int j, int i) -> Map {
      const float a = gates.open(x[j][i]);
      return {left_by(a, gates.keep(x[j][i]), w.erase_scale), a * c[j][i]};
    };
    // x becomes the weight of a pair or the gradient of its score. left: R behind the token.
    auto finish = [&](int j, int i, float left) {
      const float a = gates.open(x[j][i]), keep = gates.keep(x[j][i]);
      if (r.of == Of::write) {
        x[j][i] = a * left;
        return;
      }
      const bool closed = slots.added[slot(j, i)] == -kInfinity || !tokens.writes[token(j, i)];
      const float ds = score_gradient(w, a, keep, left * c[j][i], slots.faded[slot(j, i)],
                                      block.delta[by_slots ? n : 0][token(j, i)]);
      x[j][i] = closed ? 0.f : ds;
      total[i / 2] += x[j][i];
    };
    // Takes what was there before a token out of c.
    auto share_out = [&](int j, int i, float share) { c[j][i] -= w.erase_scale * share; };
    if constexpr (by_slots) {
#pragma unroll
      for (int row = 0; busy && row < 2; ++row) {
        float left = block.left[n][own + row * 8], share = block.share[n][own + row * 8];
        Map run;
#pragma unroll
        for (int j = 0; j < S / 8; ++j) {
          const Map first = map_of(j, 2 * row);
          Map all = then(first, map_of(j, 2 * row + 1)), before;
          float after = 1;
          meet(lane, 1, all, before, after);
          meet(lane, 2, all, before, after);
          const float here = before.keep * share + before.add;
          share_out(j, 2 * row, here);
          share_out(j, 2 * row + 1, first.keep * here + first.add);
          share = all.keep * share + all.add;
          run = j % 2 == 0 ? all : then(run, all);
          const int64_t i = block.row0 + own + row * 8, border = other / kBorder + j / 2;
          if (r.of == Of::maps && j % 2 == 1 && lane % 4 == 0 && i < p.N && border < r.borders) {
            const int64_t at = (block.batch * r.borders + border) * p.N + i;
            r.lefts[at] = run.keep, r.shares[at] = run.add;
          }
        }
#pragma unroll
        for (int j = S / 8; j-- > 0;) {
          float r0, r1;
          x[j][2 * row] = opaque(x[j][2 * row]), x[j][2 * row + 1] = opaque(x[j][2 * row + 1]);
          leave(lane, map_of(j, 2 * row).keep, map_of(j, 2 * row + 1).keep, left, r0, r1);
          finish(j, 2 * row, r0), finish(j, 2 * row + 1, r1);
        }
      }
    } else if (busy) {
#pragma unroll
      for (int at = 0; at < S / 4; ++at) {
        const int j = at / 2, i = at % 2, column = column_at(j, i);
        Map low = map_of(j, i), high = map_of(j, i + 2), before_low, before_high;
        float after_low = 1, after_high = 1;
#pragma unroll
        for (int bit = 4; bit < 32; bit *= 2) {
          meet(lane, bit, low, before_low, after_low);
          meet(lane, bit, high, before_high, after_high);
        }
        const int place = own / kBorder * S + column;
        const float left = block.left[n][place], share = block.share[n][place];
        const float behind_low = low.keep * share + low.add;
        share_out(j, i, before_low.keep * share + before_low.add);
        share_out(j, i + 2, before_high.keep * behind_low + before_high.add);
        finish(j, i, left * (high.keep * after_low));
        finish(j, i + 2, left * after_high);
      }
      if (r.of == Of::weights) {
        const int64_t all = r.tokens;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int64_t t = block.row0 + own + row * 8;
          if (t >= all) continue;
          auto* out =
              reinterpret_cast<float*>(token_row(r.result, p.lead, r.result.batch(p.lead, block.batch), p.T, t));
#pragma unroll
          for (int i = 0; i < S / 4; ++i) {
            const int64_t column = other + column_at(i / 2, i % 2);
            if (column < p.N) out[column] = x[i / 2][2 * row + i % 2];
          }
        }
      }
    }
    if (!busy || r.of == Of::maps || r.of == Of::deltas || r.of == Of::weights) continue;
    float drop[2];
    lift_rows<M, S>(x, drop);
    Left<M> weights[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) weights[step] = weights_left<M>(x, step);
    add_weighted<M, kSteps, kColumns>(acc, weights, drop, buffer, r.of == Of::write ? r.value_step : r.key_step,
                                      r.width - int64_t(block.block) * kColumns, opaque(lane));
  }
  wait_copies<0>();

  const int lane = tid % 32, own = warp * 16 + lane / 4;
  const View& result = r.result;
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

}  // namespace
}  // namespace mk::cuda
