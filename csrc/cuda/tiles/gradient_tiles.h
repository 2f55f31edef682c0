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
//
// Where tokens have ranges of slots, a block of tokens walks the tiles between the smallest first and the largest stop
// of its tokens. A block of slots leaves out tiles of tokens of which none may address one of its slots: a kernel
// before the passes finds the span of every tile of tokens. A product that is not finite is made again without the
// pairs that are out of range.
#pragma once

#include "cuda/tiles/gradient_sides.h"

namespace mk::cuda {
namespace {

// Loads the rows of this side once, and those of the other side tile by tile; n counts the tiles of the range, and
// `turn` alternates from tile to tile. The parts of a tile are in the order of their use: parts of rows with V columns,
// then of rows with K columns. dv has all parts with K columns first, then the part with V columns that it sums. M: the
// arithmetic of scores and of the sum; W: the type of the values, in which dw is multiplied.
template <class M, class W, Of of>
struct Loader {
  using X = Stored<M>;
  static constexpr bool by_slots = of != Of::query, of_values = of == Of::values;
  static constexpr int S = kTile<X, W, of>;

  const Tiling& g;
  Shared<S>& block;
  Buffers buffers;
  char *keyed, *valued;    // rows of this side: [64, K] and [64, V]
  int turn = 0, next = 0;  // of the current tile; the tile after it

  MK_DEVICE const Rows<S>& tile() const { return block.tile[turn]; }
  MK_DEVICE TokenRanges<of, S> ranges() const { return {g.ranges_at}; }
  MK_DEVICE int parts() const { return g.key_parts + (of_values ? 1 : g.value_parts); }
  // The k-th part of rows with K columns, in the order of their use: the part that is summed is the last.
  MK_DEVICE int key_part(int k) const {
    if (of_values) return k;
    const int part = k + 1 + block.block;
    return part < g.key_parts ? part : part - g.key_parts;
  }

  // All lanes: the first tile from n on with which some slot of the block is in range.
  MK_DEVICE int first_from(int n) const {
    if constexpr (by_slots) {
      if (!ranges().given()) return n;
      const SlotRange* spans = g.spans + block.batch * div_up(g.others, S) + block.begin / S;
      const int lane = int(threadIdx.x) % 32;
      for (; n < block.tiles; n += 32) {
        const bool meets = n + lane < block.tiles && spans[n + lane].meets(block.row0, block.row0 + kRows);
        const unsigned found = __ballot_sync(kAllLanes, meets);
        if (found != 0) return n + __ffs(int(found)) - 1;
      }
    }
    return n;
  }

  MK_DEVICE void look_up_tile(int n, int into) const {
    const int64_t from = block.begin + n * int64_t(S);
    look_up<by_slots>(block.tile[into], g, block.batch, from);
    if constexpr (by_slots) ranges().template look_up<S>(g, block.batch, from, into);
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

  // Starts the copy of part `part` of the tile of `rows`: [S, 128].
  MK_DEVICE void prefetch(const Rows<S>& rows, int part) {
    const SoftmaxRead& p = g.b.forward;
    const int tid = opaque(int(threadIdx.x));
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

  // Waits for part `part` of the current tile, and prefetches the one after it.
  MK_DEVICE const char* arrived(int part) {
    const char* here = buffers.arrived();
    const bool more = next < block.tiles, last = part + 1 == parts();
    if (part == 0 && more) look_up_tile(next, turn ^ 1);
    if (!last || more) prefetch(block.tile[last ? turn ^ 1 : turn], last ? 0 : part + 1);
    return here;
  }
};

// x = <dr, v> = dw of a warp's 16 rows and a tile: [16, S]. Takes the parts from `part` on.
template <class M, class W, Of of, int S>
MK_DEVICE void multiply_values(float (&x)[S / 8][4], Loader<M, W, of>& loader, int& part, bool busy) {
  using D = std::conditional_t<sizeof(W) == sizeof(Stored<M>), M, tf32>;
  const Tiling& g = loader.g;
  const int warp = int(threadIdx.x) / 32;
  Sums<D> sums[S / 8];
  for (; part < g.value_parts; ++part) {
    const char* buffer = loader.arrived(part);
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

// sums = <q, k> of a warp's 16 rows and a tile: [16, S]. Takes the parts from `part` on, and returns the last one.
template <class M, class W, Of of, int S>
MK_DEVICE const char* multiply_keys(Sums<M> (&sums)[S / 8], Loader<M, W, of>& loader, int& part, bool busy) {
  using X = Stored<M>;
  const Tiling& g = loader.g;
  const int warp = int(threadIdx.x) / 32;
  const char* buffer = nullptr;
  for (int k = 0; k < g.key_parts; ++k, ++part) {
    buffer = loader.arrived(part);
    if (!busy) continue;
    const int64_t at = int64_t(loader.key_part(k)) * kColumns;
    add_products<M, S>(sums, loader.keyed + warp * 16 * g.key_pitch, g.key_pitch, int(at * sizeof(X)), buffer,
                       g.key_step, int(least(kColumns, g.b.forward.K - at) * sizeof(X)));
  }
  return buffer;
}

// Turns x = dw [16, S] into w for dv, else into ds, and adds the rows of ds to `total`. sums: <q, k>. inside(row, j):
// is the pair of this lane's row 0 or 1 and row j of the tile in range?
template <Of of, class M, int S, class Inside>
MK_DEVICE void weigh(float (&x)[S / 8][4], float (&total)[2], const Sums<M> (&sums)[S / 8], const Rows<kRows>& own_rows,
                     const Rows<S>& tile, float scale, Inside&& inside) {
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
      const bool open = added != -kInfinity && lse != -kInfinity && inside(i / 2, column);
      const float w = open ? power_of_two(above * kLog2e) : 0.f;
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

// Is the pair of this lane's row 0 or 1 and row j of tile n in range?
template <class M, class W, Of of>
MK_DEVICE bool in_range(const Loader<M, W, of>& loader, int n, int row, int j) {
  const auto ranges = loader.ranges();
  if (!ranges.given()) return true;
  const int own = opaque(int(threadIdx.x)) / 32 * 16 + opaque(int(threadIdx.x)) % 32 / 4 + row * 8;
  if (of == Of::query) return ranges.of_tile(0)[own].holds(loader.block.begin + n * int64_t(loader.S) + j);
  return ranges.of_tile(loader.turn)[j].holds(loader.block.row0 + own);
}

template <class M, class W, Of of>
MK_KERNEL_BLOCKS(kThreads, 3)
sum_tiles(MK_PARAM(Tiling) g) {
  using X = Stored<M>;
  constexpr bool of_values = of == Of::values;
  constexpr int S = kTile<X, W, of>, kDepth = 32 / int(sizeof(X));  // rows of a step of the sum
  // Steps at a time: two for exact float32, whose fragments of four would spill.
  constexpr int kSteps = std::is_same_v<M, float> ? 2 : S / kDepth;
  const SoftmaxRead& p = g.b.forward;
  Shared<S>& block = *reinterpret_cast<Shared<S>*>(shared_memory());
  char *buffers = shared_memory() + sizeof(Shared<S>), *keyed = buffers + kBuffers * g.buffer_bytes;
  Loader<M, W, of> loader{g, block, {buffers, g.buffer_bytes}, keyed, keyed + kRows * g.key_pitch};
  locate(block, g);
  look_up<of == Of::query>(block.own, g, block.batch, block.row0);
  if constexpr (of == Of::query) narrow(block, loader.ranges(), g);
  int n = loader.first_from(0);
  loader.look_up_tile(n, 0);
  __syncthreads();
  loader.prefetch_own();
  loader.prefetch(loader.tile(), 0);

  const bool busy = block.row0 + int(threadIdx.x) / 32 * 16 < g.rows;  // this warp has a row
  float acc[kColumns / 8][4] = {}, total[2] = {};
  for (; n < block.tiles; n = loader.next, loader.turn ^= 1) {
    loader.next = loader.first_from(n + 1);
    float x[S / 8][4] = {};
    int part = 0;
    const char* buffer = nullptr;
    if constexpr (!of_values) multiply_values<M, W, of, S>(x, loader, part, busy);
    const auto inside = [&](int row, int j) { return in_range<M, W, of>(loader, n, row, j); };
    {
      Sums<M> sums[S / 8];
      buffer = multiply_keys<M, W, of, S>(sums, loader, part, busy);
      weigh<of, M, S>(x, total, sums, block.own, loader.tile(), float(p.scale), inside);
    }
    if constexpr (of_values) buffer = loader.arrived(part);
    if (!busy) continue;

    float drop[2];
    lift_rows<M, S>(x, drop);
    const int64_t columns = (of_values ? p.V : p.K) - int64_t(block.block) * kColumns;
    const int pitch = of_values ? g.value_step : g.key_step, lane = opaque(int(threadIdx.x) % 32);
#pragma unroll
    for (int step0 = 0; step0 < S / kDepth; step0 += kSteps) {
      Left<M> weights[kSteps];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) weights[step] = weights_left<M>(x, step0 + step);
      const char* rows = buffer + step0 * kDepth * pitch;
      const auto counts = [&](int row, int j) { return inside(row, step0 * kDepth + j); };
      const auto check = [&](Sums<M>(&sums)[2], int column) {
        if (loader.ranges().given()) sum_inside<M>(sums, weights, rows, pitch, column, lane, counts);
      };
      add_weighted<M, kSteps, kColumns>(acc, weights, drop, rows, pitch, columns, lane, check);
    }
  }
  wait_copies<0>();
  store_sums<of>(g, block, acc, total);
}

// The spans of the tiles of S tokens, one thread for each.
MK_KERNEL(kThreads) find_spans(MK_PARAM(SoftmaxRead) p, SlotRange* spans, int S) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, tiles = div_up(p.lead.folded() * p.T, S);
  if (at >= p.lead.batches() * tiles) return;
  SlotRange span{p.N, 0};
  for (int i = 0; i < S; ++i) {
    const SlotRange one = range_of(p.range, p.lead, at / tiles, p.T, at % tiles * S + i, p.N);
    span = {least(span.first, one.first), most(span.stop, one.stop)};
  }
  spans[at] = span;
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
