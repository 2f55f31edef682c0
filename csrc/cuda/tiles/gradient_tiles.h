// Gradients of softmax_read for many tokens: products of tiles on the tensor cores. With term_t = dlse_t - <dr_t, r_t>:
//   w[t, i] = exp(s[t, i] - lse_t - rest_t),   dw[t, i] = <dr_t, v_i>,   ds[t, i] = w (dw + term_t)
//   dq_t = scale sum_i ds[t, i] k_i                                 a block has 64 tokens and walks tiles of slots
//   dk_i = scale sum_t ds[t, i] q_t,   dmask_i = sum_t ds[t, i]     a block has 64 slots and walks tiles of tokens
//   dv_i = sum_t w[t, i] dr_t                                       likewise
//
// One kernel for the three. Its four warps have 16 rows of the result each, and up to 128 columns, in registers. The rows of this
// side stay in shared memory: keys and values of slots, or query and dr of tokens. Rows of the other side arrive in parts of 128
// columns that take turns in two buffers, one on its way by cp.async while the other is multiplied; the part that is summed comes
// last, because it is used twice: as columns of the scores, then as depth of the sum. So w and ds never leave registers.
//
// All pairs are computed again for dq, dk and dv, 3 + 3 + 2 products where one pass would take 5: nothing of size [T, N] is kept, no
// atomics are needed, and every sum has one order. The walk is cut into ranges where results alone would not fill the chip; they
// meet in scratch memory and are added up in order by a second kernel.
//
// ds has no bound, and much of it is too small for float16: its rows are brought near 2^14 by a power of two before they are rounded.
#pragma once

#include "cuda/tiles/read_ranges.h"

namespace mk::cuda {
namespace {

constexpr int kThreads = 128, kRows = 64, kColumns = 128, kBuffers = 2;

enum class Of : int8_t { query, keys, values };

struct Tiling {
  SoftmaxReadBackward b;
  const float* terms;          // [batches][tokens]
  float* partial;              // [splits][rows of all batches][width], then [splits][rows] of dmask; null: one range
  int64_t rows, others;        // of a batch: of this side, and of the side that is walked
  int64_t tiles;               // of this side, per batch
  int64_t splits, split_rows;  // of the other side
  int blocks;                  // of columns
  int key_parts, value_parts;  // of rows with K and with V columns
  int key_pitch, value_pitch;  // of those that stay
  int key_step, value_step;    // of those that arrive in parts
  int buffer_bytes;
  bool query_packs, key_packs, value_packs, read_packs;
};

// Rows that arrive at a time: what stays and two buffers shall leave room for two blocks where rows have 128 columns.
template <class X, class W, Of of>
constexpr int kTile = of == Of::values ? 128 / int(sizeof(X))
                      : sizeof(X) == 4 ? 16
                                       : 32;

// Rows of one side: query and dr of tokens, with lse, term and lse_rest; or keys and values of slots, with what the mask adds.
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

// Threads below R: finds the rows from `from` on.
template <bool tokens, int R>
MK_DEVICE void look_up(Rows<R>& rows, const Tiling& g, int64_t batch, int64_t from) {
  const int r = int(threadIdx.x);
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

// M: the arithmetic of scores and of the sum; W: the numbers of values, with which dw is multiplied.
template <class M, class W, Of of>
MK_KERNEL_BLOCKS(kThreads, 3)
sum_tiles(MK_PARAM(Tiling) g) {
  using X = Stored<M>;
  using D = std::conditional_t<sizeof(W) == sizeof(X), M, tf32>;
  constexpr bool by_slots = of != Of::query, of_values = of == Of::values;
  constexpr int S = kTile<X, W, of>, kSteps = S * int(sizeof(X)) / 32;
  const SoftmaxRead& p = g.b.forward;
  const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32;
  Shared<S>& block = *reinterpret_cast<Shared<S>*>(shared_memory());
  char* buffers = shared_memory() + sizeof(Shared<S>);
  char *keyed = buffers + kBuffers * g.buffer_bytes, *valued = keyed + kRows * g.key_pitch;  // the rows that stay
  if (tid == 0) {
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
  look_up<!by_slots>(block.own, g, block.batch, block.row0);
  look_up<by_slots>(block.tile[0], g, block.batch, block.begin);
  __syncthreads();

  const View &keyed_rows = by_slots ? p.keys : p.query, &valued_rows = by_slots ? p.values : g.b.d_read;
  copy_rows<X, kThreads>(tid, kRows, p.K, by_slots ? g.key_packs : g.query_packs, keyed_rows.data, keyed, g.key_pitch,
                         [&](int i) { return block.own.first[i]; });
  if constexpr (!of_values) {
    auto row_of = [&](int i) { return block.own.second[i]; };
    if constexpr (by_slots || sizeof(W) == sizeof(X)) {
      copy_rows<W, kThreads>(tid, kRows, p.V, by_slots ? g.value_packs : g.read_packs, valued_rows.data, valued,
                             g.value_pitch, row_of);
    } else {
      widen_rows<kThreads>(tid, g.b.d_read.dtype, kRows, p.V, valued, g.value_pitch, row_of);
    }
  }

  // The parts of a tile, in the order in which they are used.
  const int parts = g.key_parts + (of_values ? 1 : g.value_parts);
  auto key_part = [&](int k) {  // the one that is summed comes last
    if (of_values) return k;
    const int part = k + 1 + block.block;
    return part < g.key_parts ? part : part - g.key_parts;
  };
  int turn = 0;
  auto ask = [&](int n, int part) {
    const int tid = opaque(int(threadIdx.x));
    const Rows<S>& tile = block.tile[n % 2];
    char* buffer = buffers + turn * g.buffer_bytes;
    turn ^= 1;
    if (of_values ? part < g.key_parts : part >= g.value_parts) {
      const int64_t at = int64_t(key_part(of_values ? part : part - g.value_parts)) * kColumns;
      copy_rows<X, kThreads>(tid, S, least(kColumns, p.K - at), by_slots ? g.query_packs : g.key_packs,
                             (by_slots ? p.query : p.keys).data, buffer, g.key_step, [&](int i) {
                               const char* row = tile.first[i];
                               return row == nullptr ? nullptr : row + at * int64_t(sizeof(X));
                             });
    } else {
      using Given = std::conditional_t<by_slots, X, W>;
      const int64_t at = int64_t(of_values ? block.block : part) * kColumns;
      auto row_of = [&](int i) {
        const char* row = tile.second[i];
        return row == nullptr ? nullptr : row + at * int64_t(sizeof(Given));
      };
      if constexpr (of_values || sizeof(Given) == sizeof(W)) {
        copy_rows<Given, kThreads>(tid, S, least(kColumns, p.V - at), by_slots ? g.read_packs : g.value_packs,
                                   (by_slots ? g.b.d_read : p.values).data, buffer, g.value_step, row_of);
      } else {
        widen_rows<kThreads>(tid, (by_slots ? g.b.d_read : p.values).dtype, S, least(kColumns, p.V - at), buffer,
                             g.value_step, row_of);
      }
    }
    commit_copies();
  };
  ask(0, 0);

  const bool busy = block.row0 + warp * 16 < g.rows;  // this warp has a row
  const int own = warp * 16 + lane / 4;               // this lane's first row; the other one is 8 below
  float acc[kColumns / 8][4] = {}, total[2] = {};
  for (int n = 0; n < block.tiles; ++n) {
    // Waits for part `part` of the tile, and asks for the one after it.
    auto arrived = [&](int part) -> const char* {
      wait_copies<0>();
      __syncthreads();
      const char* here = buffers + (turn ^ 1) * g.buffer_bytes;
      const bool more = n + 1 < block.tiles, last = part + 1 == parts;
      if (part == 0 && more)
        look_up<by_slots>(block.tile[(n + 1) % 2], g, block.batch, block.begin + (n + 1) * int64_t(S));
      if (!last || more) ask(last ? n + 1 : n, last ? 0 : part + 1);
      return here;
    };
    const char* buffer = nullptr;
    float x[S / 8][4] = {};  // dw, then what is summed
    int part = 0;
    if constexpr (!of_values) {
      Sums<D> sums[S / 8];
      for (; part < g.value_parts; ++part) {
        buffer = arrived(part);
        if (!busy) continue;
        const int64_t at = int64_t(part) * kColumns;
        add_products<D, S>(sums, valued + warp * 16 * g.value_pitch, g.value_pitch, int(at * sizeof(W)), buffer,
                           g.value_step, int(least(kColumns, p.V - at) * sizeof(W)));
      }
#pragma unroll
      for (int j = 0; j < S / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[j][i] = sums[j][i];
      }
    }
    {
      Sums<M> sums[S / 8];
      for (int k = 0; k < g.key_parts; ++k, ++part) {
        buffer = arrived(part);
        if (!busy) continue;
        const int64_t at = int64_t(key_part(k)) * kColumns;
        add_products<M, S>(sums, keyed + warp * 16 * g.key_pitch, g.key_pitch, int(at * sizeof(X)), buffer, g.key_step,
                           int(least(kColumns, p.K - at) * sizeof(X)));
      }
#pragma unroll
      for (int j = 0; j < S / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = own + i / 2 * 8, column = j * 8 + lane % 4 * 2 + i % 2;
          const Rows<S>& tile = block.tile[n % 2];
          const float added = by_slots ? block.own.a[row] : tile.a[column];
          const float lse = by_slots ? tile.a[column] : block.own.a[row];
          const float rest = by_slots ? tile.c[column] : block.own.c[row];
          const float above = at_most_zero(score(float(p.scale), sums[j][i], added) - lse - rest);
          const float w = added == -kInfinity || lse == -kInfinity ? 0.f : power_of_two(above * kLog2e);
          if constexpr (of_values) {
            x[j][i] = w;
          } else {
            x[j][i] = w == 0 ? 0.f : w * (x[j][i] + (by_slots ? tile.b[column] : block.own.b[row]));
            total[i / 2] += x[j][i];
          }
        }
      }
    }
    if constexpr (of_values) buffer = arrived(part);
    if (!busy) continue;

    float drop[2];
    lift_rows<M, S>(x, drop);
    Left<M> weights[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) weights[step] = weights_left<M>(x, step);
    const int again = opaque(lane), pitch = of_values ? g.value_step : g.key_step;
    const int64_t columns = (of_values ? p.V : p.K) - int64_t(block.block) * kColumns;
    add_weighted<M, kSteps, kColumns>(acc, weights, drop, buffer, pitch, columns, again);
  }

  const View& result = of == Of::query ? g.b.d_query : of == Of::keys ? g.b.d_keys : g.b.d_values;
  const int64_t width = of_values ? p.V : p.K, column0 = int64_t(block.block) * kColumns, batch = block.batch;
  const float factor = of_values ? 1.f : float(p.scale);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    if constexpr (of == Of::keys) {
      total[row] += __shfl_xor_sync(kAllLanes, total[row], 1);
      total[row] += __shfl_xor_sync(kAllLanes, total[row], 2);
    }
    const int64_t at = block.row0 + own + row * 8, all = p.lead.batches() * g.rows;
    if (at >= g.rows) continue;
    float *out = nullptr, *d_mask = nullptr;
    if (g.partial != nullptr) {
      const int64_t place = block.split * all + batch * g.rows + at;
      out = g.partial + place * width + column0;
      d_mask = g.partial + g.splits * all * width + place;
    } else {
      if (result) {
        char* base = result.batch(p.lead, batch);
        out = reinterpret_cast<float*>(by_slots ? base + at * result.row : token_row(result, p.lead, base, p.T, at)) +
              column0;
      }
      if (g.b.d_mask) {
        d_mask = reinterpret_cast<float*>(g.b.d_mask.batch(p.lead, batch) + at * g.b.d_mask.row);
      }
    }
    if (of == Of::keys && d_mask != nullptr && column0 == 0 && lane % 4 == 0) *d_mask = total[row];
    if (out == nullptr) continue;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = n * 8 + lane % 4 * 2 + i;
        if (column0 + column < width) out[column] = factor * acc[n][2 * row + i];
      }
    }
  }
}

// One block per row of the result: adds up the ranges, in their order.
template <Of of>
MK_KERNEL(kThreads)
add_ranges(MK_PARAM(Tiling) g) {
  const SoftmaxRead& p = g.b.forward;
  const int64_t at = blockIdx.x, all = p.lead.batches() * g.rows, batch = at / g.rows, row = at % g.rows;
  const int64_t width = of == Of::values ? p.V : p.K;
  auto sum = [&](const float* from, int64_t step) {
    float x = 0;
    for (int64_t i = 0; i < g.splits; ++i) x += from[i * step];
    return x;
  };
  const View& result = of == Of::query ? g.b.d_query : of == Of::keys ? g.b.d_keys : g.b.d_values;
  if (result) {
    char* base = result.batch(p.lead, batch);
    auto* out =
        reinterpret_cast<float*>(of == Of::query ? token_row(result, p.lead, base, p.T, row) : base + row * result.row);
    for (int64_t c = threadIdx.x; c < width; c += kThreads) out[c] = sum(g.partial + at * width + c, all * width);
  }
  if (of == Of::keys && g.b.d_mask && threadIdx.x == 0) {
    *reinterpret_cast<float*>(g.b.d_mask.batch(p.lead, batch) + row * g.b.d_mask.row) =
        sum(g.partial + g.splits * all * width + at, all);
  }
}

}  // namespace
}  // namespace mk::cuda
