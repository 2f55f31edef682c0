// Gradients of softmax_read for many tokens: products on the tensor cores. With term_t = dlse_t - <dr_t, r_t>:
//   w[t, i] = exp(s[t, i] - lse_t - rest_t),   dw[t, i] = <dr_t, v_i>,   ds[t, i] = w (dw + term_t)
//   dq_t = scale sum_i ds[t, i] k_i                                 a block has 64 tokens and walks tiles of slots
//   dk_i = scale sum_t ds[t, i] q_t,   dmask_i = sum_t ds[t, i]     a block has 64 slots and walks tiles of tokens
//   dv_i = sum_t w[t, i] dr_t                                       the same
//
// One kernel for the three. The side of the result is "this side", the side that is walked is "the other side". A warp
// has 16 of the block's 64 rows of this side, and up to 128 columns of the result in registers. The rows of this side
// stay in shared memory: keys and values of slots, or query and dr of tokens. Per tile of S rows of the other side a
// warp does
//   score     dw and s                    [16, S], products along V and K
//   weigh     w, or ds                    [16, S]
//   multiply  acc += w dr, ds q or ds k   [16, columns]
// Rows of the other side are loaded in parts of 128 columns that alternate between two buffers: cp.async fills one
// while the other is multiplied. The part that is summed comes last, because it is used twice: along its columns for
// the scores, along its rows for the sum. So w and ds never leave registers.
//
// All pairs are computed again for dq, dk and dv: 3 + 3 + 2 products, where one pass would take 5. In return, nothing
// of size [T, N] is stored, no atomics are needed, and every sum has one order. If there are too few blocks of results
// to occupy the GPU, the other side is split into ranges. Their sums go to scratch memory, and a second kernel adds
// them up in order.
//
// ds has no bound, and much of it is too small for float16: powers of two bring its rows near 2^14 before they are
// rounded.
#pragma once

#include "cuda/tiles/buffers.h"
#include "cuda/tiles/read_ranges.h"

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

// Loads the rows of this side once, and those of the other side tile by tile; n counts the tiles of the range. The
// parts of a tile are in the order of their use: parts of rows with V columns, then of rows with K columns. dv has all
// parts with K columns first, then the part with V columns that it sums. M: the arithmetic of scores and of the sum; W:
// the type of the values, in which dw is multiplied.
template <class M, class W, Of of>
struct Loader {
  using X = Stored<M>;
  static constexpr bool by_slots = of != Of::query, of_values = of == Of::values;
  static constexpr int S = kTile<X, W, of>;

  const Tiling& g;
  Shared<S>& block;
  Buffers buffers;
  char *keyed, *valued;  // rows of this side: [64, K] and [64, V]

  MK_DEVICE const Rows<S>& tile(int n) const { return block.tile[n % 2]; }
  MK_DEVICE int parts() const { return g.key_parts + (of_values ? 1 : g.value_parts); }
  // The k-th part of rows with K columns, in the order of their use: the part that is summed is the last.
  MK_DEVICE int key_part(int k) const {
    if (of_values) return k;
    const int part = k + 1 + block.block;
    return part < g.key_parts ? part : part - g.key_parts;
  }

  MK_DEVICE void look_up_tile(int n) const {
    look_up<by_slots>(block.tile[n % 2], g, block.batch, block.begin + n * int64_t(S));
  }

  // Starts the copy of the rows of this side; they arrive with the first part.
  MK_DEVICE void prefetch_own() const {
    const SoftmaxRead& p = g.b.forward;
    const int tid = int(threadIdx.x);
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
  }

  // Starts the copy of part `part` of tile n: [S, 128].
  MK_DEVICE void prefetch(int n, int part) {
    const SoftmaxRead& p = g.b.forward;
    const int tid = opaque(int(threadIdx.x));
    const Rows<S>& rows = tile(n);
    char* buffer = buffers.next();
    if (of_values ? part < g.key_parts : part >= g.value_parts) {
      const int64_t at = int64_t(key_part(of_values ? part : part - g.value_parts)) * kColumns;
      copy_rows<X, kThreads>(tid, S, least(kColumns, p.K - at), by_slots ? g.query_packs : g.key_packs,
                             (by_slots ? p.query : p.keys).data, buffer, g.key_step, [&](int i) {
                               const char* row = rows.first[i];
                               return row == nullptr ? nullptr : row + at * int64_t(sizeof(X));
                             });
    } else {
      using Given = std::conditional_t<by_slots, X, W>;
      const int64_t at = int64_t(of_values ? block.block : part) * kColumns;
      auto row_of = [&](int i) {
        const char* row = rows.second[i];
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
  }

  // Waits for part `part` of tile n, and prefetches the one after it.
  MK_DEVICE const char* arrived(int n, int part) {
    const char* here = buffers.arrived();
    const bool more = n + 1 < block.tiles, last = part + 1 == parts();
    if (part == 0 && more) look_up_tile(n + 1);
    if (!last || more) prefetch(last ? n + 1 : n, last ? 0 : part + 1);
    return here;
  }
};

// x = <dr, v> = dw of a warp's 16 rows and tile n: [16, S]. Takes the parts from `part` on.
template <class M, class W, Of of, int S>
MK_DEVICE void multiply_values(float (&x)[S / 8][4], Loader<M, W, of>& loader, int n, int& part, bool busy) {
  using D = std::conditional_t<sizeof(W) == sizeof(Stored<M>), M, tf32>;
  const Tiling& g = loader.g;
  const int warp = int(threadIdx.x) / 32;
  Sums<D> sums[S / 8];
  for (; part < g.value_parts; ++part) {
    const char* buffer = loader.arrived(n, part);
    if (!busy) continue;
    const int64_t at = int64_t(part) * kColumns;
    add_products<D, S>(sums, loader.valued + warp * 16 * g.value_pitch, g.value_pitch, int(at * sizeof(W)), buffer,
                       g.value_step, int(least(kColumns, g.b.forward.V - at) * sizeof(W)));
  }
#pragma unroll
  for (int j = 0; j < S / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[j][i] = sums[j][i];
  }
}

// sums = <q, k> of a warp's 16 rows and tile n: [16, S]. Takes the parts from `part` on, and returns the last one.
template <class M, class W, Of of, int S>
MK_DEVICE const char* multiply_keys(Sums<M> (&sums)[S / 8], Loader<M, W, of>& loader, int n, int& part, bool busy) {
  using X = Stored<M>;
  const Tiling& g = loader.g;
  const int warp = int(threadIdx.x) / 32;
  const char* buffer = nullptr;
  for (int k = 0; k < g.key_parts; ++k, ++part) {
    buffer = loader.arrived(n, part);
    if (!busy) continue;
    const int64_t at = int64_t(loader.key_part(k)) * kColumns;
    add_products<M, S>(sums, loader.keyed + warp * 16 * g.key_pitch, g.key_pitch, int(at * sizeof(X)), buffer,
                       g.key_step, int(least(kColumns, g.b.forward.K - at) * sizeof(X)));
  }
  return buffer;
}

// Turns x = dw [16, S] into w for dv, else into ds, and adds the rows of ds to `total`. sums: <q, k>.
template <Of of, class M, int S>
MK_DEVICE void weigh(float (&x)[S / 8][4], float (&total)[2], const Sums<M> (&sums)[S / 8], const Rows<kRows>& own_rows,
                     const Rows<S>& tile, float scale) {
  constexpr bool by_slots = of != Of::query;
  const int lane = opaque(int(threadIdx.x)) % 32, own = opaque(int(threadIdx.x)) / 32 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < S / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = own + i / 2 * 8, column = j * 8 + lane % 4 * 2 + i % 2;
      const float added = by_slots ? own_rows.a[row] : tile.a[column];
      const float lse = by_slots ? tile.a[column] : own_rows.a[row];
      const float rest = by_slots ? tile.c[column] : own_rows.c[row];
      const float above = at_most_zero(score(scale, sums[j][i], added) - lse - rest);
      const float w = added == -kInfinity || lse == -kInfinity ? 0.f : power_of_two(above * kLog2e);
      if constexpr (of == Of::values) {
        x[j][i] = w;
      } else {
        x[j][i] = w == 0 ? 0.f : w * (x[j][i] + (by_slots ? tile.b[column] : own_rows.b[row]));
        total[i / 2] += x[j][i];
      }
    }
  }
}

template <Of of>
MK_DEVICE const View& result_of(const SoftmaxReadBackward& b) {
  return of == Of::query ? b.d_query : of == Of::keys ? b.d_keys : b.d_values;
}

// Stores this lane's two rows of the result [columns] and of dmask; if there are several ranges, their part of this
// range.
template <Of of, int S>
MK_DEVICE void store_sums(const Tiling& g, const Shared<S>& block, const float (&acc)[kColumns / 8][4],
                          float (&total)[2]) {
  constexpr bool by_slots = of != Of::query, of_values = of == Of::values;
  const SoftmaxRead& p = g.b.forward;
  const View& result = result_of<of>(g.b);
  const int lane = int(threadIdx.x) % 32, own = int(threadIdx.x) / 32 * 16 + lane / 4;
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

template <class M, class W, Of of>
MK_KERNEL_BLOCKS(kThreads, 3)
sum_tiles(MK_PARAM(Tiling) g) {
  using X = Stored<M>;
  constexpr bool of_values = of == Of::values;
  constexpr int S = kTile<X, W, of>, kSteps = S * int(sizeof(X)) / 32;
  const SoftmaxRead& p = g.b.forward;
  Shared<S>& block = *reinterpret_cast<Shared<S>*>(shared_memory());
  char *buffers = shared_memory() + sizeof(Shared<S>), *keyed = buffers + kBuffers * g.buffer_bytes;
  Loader<M, W, of> loader{g, block, {buffers, g.buffer_bytes}, keyed, keyed + kRows * g.key_pitch};
  locate(block, g);
  look_up<of == Of::query>(block.own, g, block.batch, block.row0);
  loader.look_up_tile(0);
  __syncthreads();
  loader.prefetch_own();
  loader.prefetch(0, 0);

  const bool busy = block.row0 + int(threadIdx.x) / 32 * 16 < g.rows;  // this warp has a row
  float acc[kColumns / 8][4] = {}, total[2] = {};
  for (int n = 0; n < block.tiles; ++n) {
    float x[S / 8][4] = {};
    int part = 0;
    const char* buffer = nullptr;
    if constexpr (!of_values) multiply_values<M, W, of, S>(x, loader, n, part, busy);
    {
      Sums<M> sums[S / 8];
      buffer = multiply_keys<M, W, of, S>(sums, loader, n, part, busy);
      weigh<of, M, S>(x, total, sums, block.own, loader.tile(n), float(p.scale));
    }
    if constexpr (of_values) buffer = loader.arrived(n, part);
    if (!busy) continue;

    float drop[2];
    lift_rows<M, S>(x, drop);
    Left<M> weights[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) weights[step] = weights_left<M>(x, step);
    const int64_t columns = (of_values ? p.V : p.K) - int64_t(block.block) * kColumns;
    add_weighted<M, kSteps, kColumns>(acc, weights, drop, buffer, of_values ? g.value_step : g.key_step, columns,
                                      opaque(int(threadIdx.x) % 32));
  }
  store_sums<of>(g, block, acc, total);
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
  const View& result = result_of<of>(g.b);
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
