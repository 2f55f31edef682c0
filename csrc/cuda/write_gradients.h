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

#include "cuda/write_tiles.h"

namespace mk::cuda {

enum class Of : int8_t {
  maps,     // what 16 tokens do to a slot, for all
  keys,     // dk and dmask
  query,    // dq
  deltas,   // sum_i a x of a token, for a softmax
  weights,  // da of gates that are given
  write,    // dw
};
constexpr int kBorder = 16;  // tokens between numbers that are kept

struct Gradients {
  Writing w;
  View d_out, retained, d_retained;             // given
  View d_values, d_keys, d_mask;                // by slots
  View d_query, d_write, d_weights;             // by tokens
  float *lefts, *shares;                        // [batches][borders][N]: R behind 16 tokens, p before them; maps of `maps`
  int* firsts;                                  // [batches][N]: of the first 16 tokens that leave a trace; none in a closed slot
  int64_t tokens, borders;                      // of a batch
  const float* deltas;                          // [batches][tokens], of a softmax
};

// Runs the passes; each in a source of its own, because they take long to compile.
void sum_by_slots(const Device&, const char* name, const Gradients&, Of);
void sum_by_tokens(const Device&, const char* name, const Gradients&, Of, float* deltas = nullptr);

namespace {

struct Tiling {
  Gradients g;
  Views views;
  Rows own_keyed, own_valued, keyed, valued;  // rows with K and with V columns, of this side and of the other
  Rows gates;                                 // that are given
  float* deltas;
  float* partial;              // [splits][rows of all batches][width], then [splits][rows] of dmask; null: one range
  int64_t rows, others;        // of a batch
  int64_t tiles;               // of this side
  int64_t splits, split_rows;  // of the other side
  int64_t width;               // of the result
  int blocks;                  // of its columns
  int key_parts, value_parts;
  int key_pitch, value_pitch;              // of rows that stay
  int key_step, value_step, gate_step;     // of those that arrive in parts
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
  int64_t batch, row0, split, begin, end;  // begin, end: of the range of the other side
  int block;                               // of columns
  Bases bases;
  Tokens<kTokens> tokens[by_slots ? 2 : 1];  // of two: this tile and the next
  float delta[by_slots ? 2 : 1][kTokens];
  Slots<kSlots> slots[by_slots ? 1 : 2];
  float left[2][kMeetings * kSlots], share[2][kMeetings * kSlots];  // R behind the tokens of a warp or tile, p before them
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
MK_DEVICE void look_up(Slots<R>& slots, const Gradients& g, const Bases& bases, int64_t first) {
  const int r = int(threadIdx.x);
  if (r >= R) return;
  const Pairs& p = g.w.pairs;
  const int64_t i = first + r;
  const float added = added_to(p, bases.of[kMask], i);
  const bool open = added != -kInfinity;
  slots.added[r] = added, slots.faded[r] = 0;
  slots.keys[r] = open ? bases.of[kKeys] + i * p.keys.row : nullptr;
  slots.upper[r] = open ? bases.of[kUpper] + i * g.d_out.row : nullptr;
  if (open && g.d_retained) {
    slots.faded[r] = load(bases.of[kDRetained] + i * g.d_retained.row, DType::f32, 0) *
                     load(bases.of[kRetained] + i * g.retained.row, DType::f32, 0);
  }
}

// The tiles of tokens and slots that begin there, into place `n` of two; `borders`: how many meetings of 16 tokens a tile has.
template <int S, bool by_slots>
MK_DEVICE void look_up(Shared<S, by_slots>& block, const Tiling& r, int n, int64_t other) {
  using Block = Shared<S, by_slots>;
  const Gradients& g = r.g;
  const int64_t t0 = by_slots ? other : block.row0, i0 = by_slots ? block.row0 : other, N = g.w.pairs.N;
  if constexpr (by_slots) {
    look_up(block.tokens[n], g.w, r.views, block.bases, block.batch, t0);
    if (int(threadIdx.x) < S) {
      const int64_t t = t0 + threadIdx.x;
      block.delta[n][threadIdx.x] = g.deltas != nullptr && t < g.tokens ? g.deltas[block.batch * g.tokens + t] : 0.f;
    }
  } else {
    look_up(block.slots[n], g, block.bases, i0);
  }
  if (r.of == Of::maps) return;
  for (int at = int(threadIdx.x); at < Block::kMeetings * Block::kSlots; at += kThreads) {
    const int64_t i = i0 + at % Block::kSlots, border = t0 / kBorder + at / Block::kSlots;
    const int64_t last = by_slots ? border + S / kBorder - 1 : border;
    auto number = [&](const float* x, int64_t at) { return x[(block.batch * g.borders + at) * N + i]; };
    block.left[n][at] = i < N && last < g.borders ? number(g.lefts, last) : 1.f;
    block.share[n][at] = i < N && border < g.borders ? number(g.shares, border) : 0.f;
  }
}

template <class M, bool by_slots>
MK_KERNEL_BLOCKS(kThreads, 3)
sum_tiles(MK_PARAM(Tiling) r) {
  using X = Stored<M>;
  constexpr int S = kOthers<X>, kSteps = S * int(sizeof(X)) / 32;
  using Block = Shared<S, by_slots>;
  const Gradients& g = r.g;
  const Writing& w = g.w;
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
    look_up(block.slots[0], g, block.bases, block.row0);
  } else {
    look_up(block.tokens[0], w, r.views, block.bases, block.batch, block.row0);
    const int64_t t = block.row0 + tid;
    if (tid < kRows) {
      block.delta[0][tid] = g.deltas != nullptr && t < g.tokens ? g.deltas[block.batch * g.tokens + t] : 0.f;
    }
  }
  // The first tile from `other` on in which a token of this block leaves a trace in a slot, or behind the last. Warps find it alike.
  auto next = [&](int64_t other) -> int64_t {
    if (r.of == Of::maps) return other;
    const int lane = opaque(int(threadIdx.x)) % 32;
    const int* firsts = g.firsts + block.batch * p.N;
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
      ask_rows<X>(tid, kRows, v == 0 ? r.own_keyed : r.own_valued, 0, v == 0 ? p.K : p.V, v == 0 ? keyed : valued,
                  v == 0 ? r.key_pitch : r.value_pitch, [&](int i) { return own_row(v != 0, i); });
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
        ask_rows<X>(tid, S, r.gates, block.row0, kRows, buffer, r.gate_step,
                    [&](int i) { return block.tokens[n].query[i]; });
      } else {
        ask_rows<X>(tid, kRows, r.gates, other, S, buffer, r.gate_step,
                    [&](int i) { return block.tokens[0].query[i]; });
      }
    } else {
      ask_rows<X>(tid, S, values ? r.valued : r.keyed, at, kColumns, buffer, step, [&](int i) -> const char* {
        if constexpr (by_slots) return values ? block.tokens[n].write[i] : block.tokens[n].query[i];
        else return values ? block.slots[n].upper[i] : block.slots[n].keys[i];
      });
      if (!r.held) {
        ask_rows<X>(tid, kRows, values ? r.own_valued : r.own_keyed, at, kColumns, buffer + S * step, step,
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
          if (r.of == Of::maps && j % 2 == 1 && lane % 4 == 0 && i < p.N && border < g.borders) {
            const int64_t at = (block.batch * g.borders + border) * p.N + i;
            g.lefts[at] = run.keep, g.shares[at] = run.add;
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
        const int64_t all = g.tokens;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int64_t t = block.row0 + own + row * 8;
          if (t >= all) continue;
          auto* out = reinterpret_cast<float*>(
              token_row(g.d_weights, p.lead, g.d_weights.batch(p.lead, block.batch), p.T, t));
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
  const View& result = r.of == Of::keys ? g.d_keys : r.of == Of::query ? g.d_query : g.d_write;
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
      if (r.of == Of::deltas) sum = r.deltas + batch * r.rows + at;
      else if (g.d_mask) sum = reinterpret_cast<float*>(g.d_mask.batch(p.lead, batch) + at * g.d_mask.row);
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

// One block per row of the result: adds up the ranges, in their order.
template <bool by_slots>
MK_KERNEL(kThreads)
add_ranges(MK_PARAM(Tiling) r) {
  const Gradients& g = r.g;
  const Pairs& p = g.w.pairs;
  const int64_t at = blockIdx.x, all = p.lead.batches() * r.rows, batch = at / r.rows, row = at % r.rows;
  auto sum = [&](const float* from, int64_t step) {
    float x = 0;
    for (int64_t i = 0; i < r.splits; ++i) x += from[i * step];
    return x;
  };
  const View& result = r.of == Of::keys ? g.d_keys : r.of == Of::query ? g.d_query : g.d_write;
  if (r.width > 0 && result) {
    char* base = result.batch(p.lead, batch);
    auto* out = reinterpret_cast<float*>(by_slots ? base + row * result.row
                                                  : token_row(result, p.lead, base, p.T, row));
    for (int64_t c = threadIdx.x; c < r.width; c += kThreads) out[c] = sum(r.partial + at * r.width + c, all * r.width);
  }
  if (threadIdx.x != 0) return;
  const float* sums = r.partial + r.splits * all * r.width + at;
  if (r.of == Of::deltas) r.deltas[at] = sum(sums, all);
  if (r.of == Of::keys && g.d_mask) {
    *reinterpret_cast<float*>(g.d_mask.batch(p.lead, batch) + row * g.d_mask.row) = sum(sums, all);
  }
}

template <class M, bool by_slots>
void sum(const Device& device, const char* name, Tiling& r) {
  using X = Stored<M>;
  constexpr int S = kOthers<X>;
  constexpr int64_t kLeastTiles = 4, kBlocksPerProcessor = 2;  // as for streams
  const Gradients& g = r.g;
  const Pairs& p = g.w.pairs;
  const int64_t all = p.lead.batches() * r.rows;
  r.tiles = div_up(r.rows, kRows);
  r.key_parts = int(most(1, div_up(p.K, kColumns))), r.value_parts = int(most(1, div_up(p.V, kColumns)));
  r.key_step = tile_pitch<X>(least(p.K, kColumns)), r.value_step = tile_pitch<X>(least(p.V, kColumns));
  r.gate_step = tile_pitch<X>(by_slots ? kRows : S);
  const int64_t step = most(r.key_step, r.value_step), item = int64_t(sizeof(X));
  const int64_t key_pitch = round_up(p.K, 16) * item + 16, value_pitch = round_up(p.V, 16) * item + 16;
  auto shared = [&](bool held) {
    const int64_t gates = p.weights ? (by_slots ? S : kRows) * int64_t(r.gate_step) : 0;
    r.buffer_bytes = int(most((held ? S : S + kRows) * step, gates));
    return int64_t(sizeof(Shared<S, by_slots>)) + kBuffers * int64_t(r.buffer_bytes) +
           (held ? kRows * (key_pitch + value_pitch) : 0);
  };
  r.held = shared(true) <= device.shared;
  r.key_pitch = r.held ? int(key_pitch) : 0, r.value_pitch = r.held ? int(value_pitch) : 0;
  const int64_t units = p.lead.batches() * r.tiles * r.blocks;
  const int64_t wanted = div_up(device.processors * kBlocksPerProcessor, most(units, 1)), tiles = div_up(r.others, S);
  r.split_rows = most(1, div_up(tiles, most(1, least(wanted, tiles / kLeastTiles)))) * S;
  r.splits = most(1, div_up(r.others, r.split_rows));
  const bool merged = r.splits > 1 && r.of != Of::maps && r.of != Of::weights;
  if (merged) r.partial = device.scratch<float>(r.splits * all * (r.width + 1));
  launch(device, name, sum_tiles<M, by_slots>, units * r.splits, kThreads, shared(r.held), r);
  if (merged) launch(device, name, add_ranges<by_slots>, all, kThreads, 0, r);
}

template <bool by_slots>
void sum_by(const Device& device, const char* name, const Gradients& g, Of of, float* deltas) {
  const Pairs& p = g.w.pairs;
  const View keys = p.weights ? View{} : p.keys;
  Tiling r{};
  r.g = g, r.of = of, r.deltas = deltas;
  r.views = views_of(g.w);
  r.views.of[kUpper] = g.d_out, r.views.of[kRetained] = g.retained, r.views.of[kDRetained] = g.d_retained;
  r.rows = by_slots ? p.N : g.tokens, r.others = by_slots ? g.tokens : p.N;
  const Rows q = rows_of(p.query, p.lead, p.K), k = rows_of(keys, p.lead, p.K);
  const Rows x = rows_of(g.w.write, p.lead, p.V), u = rows_of(g.d_out, p.lead, p.V);
  r.own_keyed = by_slots ? k : q, r.keyed = by_slots ? q : k, r.own_valued = by_slots ? u : x;
  r.valued = by_slots ? x : u, r.gates = rows_of(p.weights, p.lead, p.N);
  r.width = of == Of::write ? p.V : (of == Of::keys && g.d_keys) || of == Of::query ? p.K : 0;
  r.blocks = int(most(1, div_up(r.width, kColumns)));
  with_arithmetic(device, g.w, {&p.query, &keys, &g.w.write, &g.d_out, &p.weights},
                  [&]<class M>() { sum<M, by_slots>(device, name, r); });
}

}  // namespace
}  // namespace mk::cuda
