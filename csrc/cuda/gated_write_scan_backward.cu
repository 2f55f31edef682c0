// Gradients of gated_write, a vector e_t as erase. With g = dv', from the last token to the first:
//
//   dw_t = sum_i a g,   de_t = -sum_i a g v_{t-1},   da[t, i] = sum_j g (w - e v_{t-1}),   g <- g (1 - a e),   dv = g in the end
//   ds = da a (1 - a) - d retained * retained * a,   dq = scale ds k,   dk = scale ds^T q,   dmask_i = sum_t ds
//
// Gates that are given, and those of a softmax, have their ds as in gated_write_backward.cu.
//
// The factor depends on slot, token and column: there is no closed form over tokens. A first kernel keeps v where tiles of 32 tokens
// meet, N V T / 32 numbers. Then tile after tile, the last first: a thread owns one value column and takes the 32 slots of its block
// in turn, recomputes v of 16 tokens in registers and walks back with g, which waits in memory in between. What is summed over
// slots or columns meets in scratch memory and is added in order by the kernels that follow.
#include "cuda/tiles/gates.h"

namespace mk::cuda {
namespace {

constexpr int kSpan = 16;  // tokens whose v are in registers at once

struct Scan {
  Writing w;
  View d_out, retained, d_retained;           // given
  View d_values, d_keys, d_mask;              // by slots
  View d_query, d_write, d_erase, d_weights;  // by tokens
  int64_t token_tiles, slot_tiles, columns;   // columns: blocks of 128 value columns
  float* states;                              // [batches][token_tiles][N][V]: v before a tile
  float* flow;                                // [batches][N][V]: g after it
  float *d_writes, *d_erases;                 // [batches][slot_tiles][32][V]: parts of one tile of tokens
  float *d_gates, *d_scores;                  // [batches][columns][32][N] and [batches][32][N]: da in parts, and ds
  float *delta_parts, *deltas;                // of a softmax, [batches][slot_tiles][32] and [batches][32]
};

// Which slots, value columns and batch a block has.
struct Place {
  int64_t batch, tile, block, first, column;
  bool mine;
  MK_DEVICE explicit Place(const Scan& s) {
    block = int64_t(blockIdx.x) % s.columns;
    tile = blockIdx.x / s.columns % s.slot_tiles;
    batch = blockIdx.x / s.columns / s.slot_tiles;
    first = tile * kTile, column = block * kPairThreads + threadIdx.x;
    mine = column < s.w.pairs.V;
  }
};

struct Streams {
  float w[kTile][kPairThreads], e[kTile][kPairThreads];  // rows of tokens; 0 for those that do not write
  float part[kSpan][kPairThreads + 1];
};
struct ScanTile {
  GateTile gates;
  Streams rows;
};

// Rows of `write` and `erase` of a tile, this thread's column.
MK_DEVICE void load_rows(ScanTile& tile, const Writing& w, int64_t column, bool mine) {
  for (int t = 0; t < kTile; ++t) {
    const bool there = mine && tile.gates.pairs.a_rows[t] != nullptr;
    tile.rows.w[t][threadIdx.x] = there ? load(tile.gates.pairs.a_rows[t], w.write.dtype, column) : 0.f;
    tile.rows.e[t][threadIdx.x] = there ? load(tile.gates.erase_rows[t], w.erase.dtype, column) : 0.f;
  }
}

MK_KERNEL(kPairThreads) keep_states(MK_PARAM(Scan) s) {
  ScanTile& tile = *reinterpret_cast<ScanTile*>(shared_memory());
  const Pairs& p = s.w.pairs;
  const Place at(s);
  const int tid = int(threadIdx.x);
  find_open(tile.gates, s.w, at.batch, at.first);
  __syncthreads();
  const char* values = p.values.batch(p.lead, at.batch);
  const char* upper = s.d_out.batch(p.lead, at.batch);
  for (int r = 0; at.mine && r < kTile && at.first + r < p.N; ++r) {
    const int64_t i = at.first + r;
    tile.rows.w[r][tid] = load(values + i * p.values.row, p.values.dtype, at.column);
    s.flow[(at.batch * p.N + i) * p.V + at.column] = load(upper + i * s.d_out.row, s.d_out.dtype, at.column);
  }
  float v[kTile];
#pragma unroll
  for (int r = 0; r < kTile; ++r) v[r] = at.mine && at.first + r < p.N ? tile.rows.w[r][tid] : 0.f;
  for (int64_t n = 0; n < s.token_tiles; ++n) {
    // By way of shared memory, a column of a thread's own: an address per slot would take more registers than v itself.
#pragma unroll
    for (int r = 0; r < kTile; ++r) tile.rows.w[r][tid] = v[r];
    float* row = s.states + ((at.batch * s.token_tiles + n) * p.N + at.first) * p.V + at.column;
#pragma unroll 1
    for (int r = 0; at.mine && r < kTile && at.first + r < p.N; ++r) row[r * p.V] = tile.rows.w[r][tid];
    open_gates(tile.gates, s.w, at.batch, n * kTile, at.first, nullptr);
    load_rows(tile, s.w, at.column, at.mine);
    for (int t = 0; t < kTile; ++t) {
      const float w = tile.rows.w[t][tid], e = tile.rows.e[t][tid];
#pragma unroll
      for (int r = 0; r < kTile; ++r) {
        const float a = tile.gates.pairs.w[t][r];
        v[r] = a * w + (1.f - a * e) * v[r];
      }
    }
  }
}

// Walks back over tile n of the tokens.
MK_KERNEL(kPairThreads) walk_back(MK_PARAM(Scan) s, int64_t n) {
  ScanTile& tile = *reinterpret_cast<ScanTile*>(shared_memory());
  const Pairs& p = s.w.pairs;
  const Place at(s);
  const int tid = int(threadIdx.x);
  find_open(tile.gates, s.w, at.batch, at.first);
  __syncthreads();
  open_gates(tile.gates, s.w, at.batch, n * kTile, at.first, nullptr);
  load_rows(tile, s.w, at.column, at.mine);
  float* d_gates = s.d_gates + (at.batch * s.columns + at.block) * kTile * p.N + at.first;
  for (int t0 = kTile - kSpan; t0 >= 0; t0 -= kSpan) {
    float dw[kSpan] = {}, de[kSpan] = {};
    for (int r = 0; r < kTile && at.first + r < p.N; ++r) {
      if (tile.gates.open[r]) {
        const int64_t i = at.first + r;
        float* flow = s.flow + (at.batch * p.N + i) * p.V + at.column;
        float v[kSpan], x = 0, g = 0;
        if (at.mine) x = s.states[((at.batch * s.token_tiles + n) * p.N + i) * p.V + at.column], g = *flow;
        auto step = [&](int t) {
          return x + tile.gates.pairs.w[t][r] * (tile.rows.w[t][tid] - tile.rows.e[t][tid] * x);
        };
        for (int t = 0; t < t0; ++t) x = step(t);
#pragma unroll
        for (int t = 0; t < kSpan; ++t) v[t] = x, x = step(t0 + t);
#pragma unroll
        for (int t = kSpan - 1; t >= 0; --t) {
          const float a = tile.gates.pairs.w[t0 + t][r], e = tile.rows.e[t0 + t][tid];
          tile.rows.part[t][tid] = g * (tile.rows.w[t0 + t][tid] - e * v[t]);
          dw[t] += a * g, de[t] -= a * g * v[t];
          g *= left_by(a, tile.gates.pairs.ds[t0 + t][r], e);
        }
        if (at.mine) *flow = g;
      }
      __syncthreads();
      // Neighbouring threads add up the columns of one token.
      constexpr int kShare = kPairThreads / kSpan;
      const int t = tid / kShare;
      float sum = 0;
      for (int c = tid % kShare; tile.gates.open[r] && c < kPairThreads; c += kShare) sum += tile.rows.part[t][c];
#pragma unroll
      for (int d = kShare / 2; d > 0; d /= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
      if (tid % kShare == 0) d_gates[(t0 + t) * p.N + r] = sum;
      __syncthreads();
    }
    const int64_t row = ((at.batch * s.slot_tiles + at.tile) * kTile + t0) * p.V + at.column;
#pragma unroll
    for (int t = 0; t < kSpan; ++t) {
      if (at.mine) s.d_writes[row + t * p.V] = dw[t], s.d_erases[row + t * p.V] = de[t];
    }
  }
}

// Gradients of the rows of tile n, from its parts in the order of the slots. One block per batch, token and 128 columns.
MK_KERNEL(kPairThreads) add_parts(MK_PARAM(Scan) s, int64_t n) {
  const Pairs& p = s.w.pairs;
  const int64_t column = blockIdx.x % s.columns * kPairThreads + threadIdx.x, row = blockIdx.x / s.columns % kTile;
  const int64_t batch = blockIdx.x / s.columns / kTile, t = n * kTile + row;
  if (t >= p.lead.folded() * p.T || column >= p.V) return;
  float w = 0, e = 0;
  for (int64_t tile = 0; tile < s.slot_tiles; ++tile) {
    const int64_t part = ((batch * s.slot_tiles + tile) * kTile + row) * p.V + column;
    w += s.d_writes[part], e += s.d_erases[part];
  }
  if (s.d_write) store(token_row(s.d_write, p.lead, s.d_write.batch(p.lead, batch), p.T, t), DType::f32, column, w);
  if (s.d_erase) store(token_row(s.d_erase, p.lead, s.d_erase.batch(p.lead, batch), p.T, t), DType::f32, column, e);
}

// d retained * retained of slot i.
MK_DEVICE float faded_at(const Scan& s, int64_t batch, int64_t i) {
  const Pairs& p = s.w.pairs;
  if (i >= p.N || !s.d_retained) return 0;
  return load(s.d_retained.batch(p.lead, batch) + i * s.d_retained.row, DType::f32, 0) *
         load(s.retained.batch(p.lead, batch) + i * s.retained.row, DType::f32, 0);
}

// da of token t of a tile and slot i: its parts in the order of the columns.
MK_DEVICE float gate_gradient(const Scan& s, int64_t batch, int t, int64_t i) {
  const int64_t N = s.w.pairs.N;
  float da = 0;
  for (int64_t c = 0; i < N && c < s.columns; ++c) da += s.d_gates[((batch * s.columns + c) * kTile + t) * N + i];
  return da;
}

// Of a softmax: parts of the delta_t of tile n, one block per 32 slots.
MK_KERNEL(kPairThreads) part_deltas(MK_PARAM(Scan) s, int64_t n) {
  GateTile& tile = *reinterpret_cast<GateTile*>(shared_memory());
  const int tid = int(threadIdx.x);
  const int64_t batch = blockIdx.x / s.slot_tiles, first = blockIdx.x % s.slot_tiles * kTile;
  find_open(tile, s.w, batch, first);
  __syncthreads();
  open_gates(tile, s.w, batch, n * kTile, first, nullptr);
  if (tid < kTile) {
    const float faded = faded_at(s, batch, first + tid);
    for (int t = 0; t < kTile; ++t) {
      const bool on = tile.open[tid] && tile.pairs.a_rows[t] != nullptr;
      const float da = gate_gradient(s, batch, t, first + tid);
      tile.pairs.b[t][tid] =
          on ? score_gradient(s.w, tile.pairs.w[t][tid], tile.pairs.ds[t][tid], da, faded, 0.f) : 0.f;
    }
  }
  __syncthreads();
  if (tid >= kTile) return;
  float sum = 0;
  for (int r = 0; r < kTile; ++r) sum += tile.pairs.b[tid][r];
  s.delta_parts[(batch * s.slot_tiles + blockIdx.x % s.slot_tiles) * kTile + tid] = sum;
}

// One warp per token.
MK_KERNEL(kPairThreads) add_deltas(MK_PARAM(Scan) s) {
  const int64_t at = int64_t(blockIdx.x) * (kPairThreads / 32) + threadIdx.x / 32, batch = at / kTile;
  float sum = 0;
  for (int64_t tile = threadIdx.x % 32; tile < s.slot_tiles; tile += 32)
    sum += s.delta_parts[(batch * s.slot_tiles + tile) * kTile + at % kTile];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) s.deltas[at] = sum;
}

// ds of tile n (or da, of gates that are given), and its part of dk and dmask, which grow from tile to tile. One block per 32 slots and 128 columns of K.
MK_KERNEL(kPairThreads) add_scores(MK_PARAM(Scan) s, int64_t n, int64_t blocks) {
  GateTile& tile = *reinterpret_cast<GateTile*>(shared_memory());
  const Pairs& p = s.w.pairs;
  const int tid = int(threadIdx.x);
  const int64_t block = blockIdx.x % blocks, first = blockIdx.x / blocks % s.slot_tiles * kTile;
  const int64_t batch = blockIdx.x / blocks / s.slot_tiles, column = block * kPairThreads + tid;
  const bool last = n == s.token_tiles - 1;  // the first to be added
  find_open(tile, s.w, batch, first);
  __syncthreads();
  open_gates(tile, s.w, batch, n * kTile, first, nullptr);
  if (tid < kTile) {
    const int64_t i = first + tid;
    const float faded = faded_at(s, batch, i);
    float total = 0;
    for (int t = 0; t < kTile; ++t) {
      const float a = tile.pairs.w[t][tid];
      const float da = gate_gradient(s, batch, t, i), delta = s.deltas == nullptr ? 0.f : s.deltas[batch * kTile + t];
      const bool on = tile.open[tid] && tile.pairs.a_rows[t] != nullptr;
      const float ds = on ? score_gradient(s.w, a, tile.pairs.ds[t][tid], da, faded, delta) : 0.f;
      tile.pairs.b[t][tid] = ds;
      total += ds;
    }
    if (s.d_mask && block == 0 && i < p.N) {
      auto* sum = reinterpret_cast<float*>(s.d_mask.batch(p.lead, batch) + i * s.d_mask.row);
      *sum = last ? total : *sum + total;
    }
  }
  point_open(tile, s.w, batch, p.query, n * kTile, nullptr, first);
  for (int j = tid; j < kTile * kTile; j += kPairThreads) {
    const int t = j / kTile, r = j % kTile;
    tile.pairs.ds[t][r] = tile.pairs.b[t][r];
    if (block == 0 && first + r < p.N) s.d_scores[(batch * kTile + t) * p.N + first + r] = tile.pairs.b[t][r];
  }
  __syncthreads();
  if (s.d_weights && block == 0) {
    point(tile.pairs, p, batch, s.d_weights, n * kTile, p.keys, 0);
    store_gates(tile.pairs.ds, tile.pairs, first, p.N);
    return;  // given gates have no keys
  }
  if (!s.d_keys || column >= p.K) return;
  float acc[kTile] = {};
  add_rows(tile.pairs.ds, tile.pairs.a_rows, p.query.dtype, column, acc);
  char* row = s.d_keys.batch(p.lead, batch) + first * s.d_keys.row;
#pragma unroll
  for (int r = 0; r < kTile; ++r, row += s.d_keys.row) {
    if (first + r >= p.N) continue;
    float& sum = reinterpret_cast<float*>(row)[column];
    sum = (last ? 0.f : sum) + float(p.scale) * acc[r];
  }
}

// dq of tile n from its ds. One block per batch and 128 columns.
MK_KERNEL(kPairThreads) add_queries(MK_PARAM(Scan) s, int64_t n, int64_t blocks) {
  GateTile& tile = *reinterpret_cast<GateTile*>(shared_memory());
  const Pairs& p = s.w.pairs;
  const int64_t batch = blockIdx.x / blocks, column = blockIdx.x % blocks * kPairThreads + threadIdx.x;
  float acc[kTile] = {};
  for (int64_t i0 = 0; i0 < p.N; i0 += kTile) {
    point(tile.pairs, p, batch, p.query, n * kTile, p.keys, i0);
    for (int j = int(threadIdx.x); j < kTile * kTile; j += kPairThreads) {
      const int t = j / kTile, r = j % kTile;
      tile.pairs.ds[r][t] = i0 + r < p.N ? s.d_scores[(batch * kTile + t) * p.N + i0 + r] : 0.f;
    }
    __syncthreads();
    if (column < p.K) add_rows(tile.pairs.ds, tile.pairs.b_rows, p.keys.dtype, column, acc);
  }
  point(tile.pairs, p, batch, s.d_query, n * kTile, p.keys, 0);
#pragma unroll
  for (int r = 0; r < kTile; ++r) {
    if (column >= p.K || tile.pairs.a_rows[r] == nullptr) continue;
    reinterpret_cast<float*>(tile.pairs.a_rows[r])[column] = float(p.scale) * acc[r];
  }
}

MK_KERNEL(kPairThreads) copy_flow(MK_PARAM(Scan) s) {
  const Pairs& p = s.w.pairs;
  const int64_t batch = blockIdx.x / p.N, i = blockIdx.x % p.N;
  const float* flow = s.flow + (batch * p.N + i) * p.V;
  auto* row = reinterpret_cast<float*>(s.d_values.batch(p.lead, batch) + i * s.d_values.row);
  for (int64_t c = threadIdx.x; c < p.V; c += kPairThreads) row[c] = flow[c];
}

}  // namespace

void gated_write_scan_backward(const Device& device, const GatedWriteBackward& b) {
  const GatedWrite& f = b.forward;
  const char* name = name_of(f);
  Scan s{};
  s.w = writing_of(device, name, f);
  s.d_out = b.d_out, s.retained = f.retained, s.d_retained = b.d_retained;
  s.d_values = b.d_values, s.d_keys = b.d_keys, s.d_mask = b.d_mask;
  s.d_query = b.d_query, s.d_write = b.d_write, s.d_erase = b.d_erase, s.d_weights = b.d_weights;
  s.token_tiles = div_up(f.lead.folded() * f.T, kTile), s.slot_tiles = div_up(f.N, kTile);
  s.columns = most(1, div_up(f.V, kPairThreads));
  const int64_t batches = f.lead.batches(), parts = batches * s.slot_tiles * kTile * f.V;
  s.states = device.scratch<float>(batches * s.token_tiles * f.N * f.V);
  s.flow = device.scratch<float>(batches * f.N * f.V);
  s.d_writes = device.scratch<float>(parts), s.d_erases = device.scratch<float>(parts);
  s.d_gates = device.scratch<float>(batches * s.columns * kTile * f.N);
  s.d_scores = device.scratch<float>(batches * kTile * f.N);
  if (s.w.softmax != nullptr) {
    s.delta_parts = device.scratch<float>(batches * s.slot_tiles * kTile);
    s.deltas = device.scratch<float>(batches * kTile);
  }
  const int64_t blocks = batches * s.slot_tiles * s.columns, key_blocks = most(1, div_up(f.K, kPairThreads));
  launch(device, name, keep_states, blocks, kPairThreads, sizeof(ScanTile), s);
  for (int64_t n = s.token_tiles; n-- > 0;) {
    launch(device, name, walk_back, blocks, kPairThreads, sizeof(ScanTile), s, n);
    launch(device, name, add_parts, batches * kTile * s.columns, kPairThreads, 0, s, n);
    if (s.w.softmax != nullptr) {
      launch(device, name, part_deltas, batches * s.slot_tiles, kPairThreads, sizeof(GateTile), s, n);
      launch(device, name, add_deltas, batches * kTile / (kPairThreads / 32), kPairThreads, 0, s);
    }
    launch(device, name, add_scores, batches * s.slot_tiles * key_blocks, kPairThreads, sizeof(GateTile), s, n,
           key_blocks);
    if (s.d_query)
      launch(device, name, add_queries, batches * key_blocks, kPairThreads, sizeof(GateTile), s, n, key_blocks);
  }
  if (s.d_values) launch(device, name, copy_flow, batches * f.N, kPairThreads, 0, s);
}

}  // namespace mk::cuda
