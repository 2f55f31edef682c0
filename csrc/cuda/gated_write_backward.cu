// Gradients of gated_write, erase a number e. With U = dv', R[t] = prod_{u > t} (1 - e a[u]), c[t, i] = <w_t, u_i> and the share of
// the result that was there before token t, seen through U, p_0 = <v_i, u_i>, p_t = (1 - e a[t]) p_{t-1} + a[t] c[t]:
//
//   dv = R[0] U,   dw_t = sum_i a R u_i,   ds[t, i] = R[t] (c[t] - e p_{t-1}) a (1 - a) - g_i retained_i a,   g = d retained
//   dq = scale ds k,   dk = scale ds^T q,   dmask_i = sum_t ds
//
// Gates that are given have da[t, i] = R[t] (c[t] - e p_{t-1}) in the place of ds. Those of a softmax have
//
//   x[t, i] = da[t, i] - g_i retained_i / (1 - a),   delta_t = sum_i a x,   ds = a (x - delta_t)
//
// R runs from the last token to the first and p the other way. Two sweeps over the tokens, one block per 32 slots, keep both where
// tiles of 32 tokens meet: 2 N T / 32 numbers. Every tile is then known by itself, and sums over slots and over tokens are taken as
// in pairs.cu, each pass recomputing its tiles: no [T, N], one fixed order, nothing divided by 1 - a. Tiles of which no trace is
// left, because R is 0 behind them, are passed over.
#include "cuda/gates.h"

namespace mk::cuda {
namespace {

struct Gradients {
  View d_out, retained, d_retained;  // given
  View d_values, d_keys, d_mask;     // by slots
  View d_query, d_write, d_weights;  // by tokens
  float *lefts, *shares;             // [batches][tiles of tokens][N]: R after a tile, p before it
  int64_t token_tiles, slot_tiles;
  const float* deltas;  // [batches][tokens], of a softmax
};

struct WeighTile {
  GateTile gates;
  // a R and ds, [slot][token] or [token][slot]; read four at a time.
  alignas(16) float w[kTile][kPitch], ds[kTile][kPitch];
};

// Where the numbers of slot i between tiles of tokens lie; `n` counts tiles.
MK_DEVICE int64_t between(const Gradients& g, const Pairs& p, int64_t batch, int64_t n, int64_t i) {
  return (batch * g.token_tiles + n) * p.N + i;
}

// The gates of a tile, and c as pairs.a[t][i]. b_rows are then those of U.
MK_DEVICE void open_products(GateTile& tile, const Writing& w, const Gradients& g, int64_t batch, int64_t t0,
                             int64_t i0) {
  open_gates(tile, w, batch, t0, i0, &g.d_out);
  float c[2][4] = {};
  multiply_rows(tile.pairs, w.write.dtype, g.d_out.dtype, w.pairs.V, c);
#pragma unroll
  for (int x = 0; x < 2; ++x) {
#pragma unroll
    for (int y = 0; y < 4; ++y) tile.pairs.a[threadIdx.x / 8 + 16 * x][threadIdx.x % 8 + 8 * y] = c[x][y];
  }
  __syncthreads();
}

// Is any trace left of what tokens of tile n wrote into these slots? Begins and ends with a barrier.
MK_DEVICE bool leaves_traces(GateTile& tile, const Writing& w, const Gradients& g, int64_t batch, int64_t n,
                             int64_t i0) {
  if (!w.forgets()) return true;
  __syncthreads();  // the answer of before has been read
  const int slot = int(threadIdx.x);
  if (slot < kTile) {
    const bool left = tile.open[slot] && g.lefts[between(g, w.pairs, batch, n, i0 + slot)] != 0;
    const bool alive = __any_sync(kAllLanes, left);
    if (slot == 0) tile.alive = alive;
  }
  __syncthreads();
  return tile.alive;
}

// Keeps R and p between tiles, and writes dv.
MK_KERNEL(kPairThreads) keep_between(MK_PARAM(Writing) w, MK_PARAM(Gradients) g) {
  GateTile& tile = *reinterpret_cast<GateTile*>(shared_memory());
  const Pairs& p = w.pairs;
  const int tid = int(threadIdx.x), lane = tid % 32;
  const int64_t batch = blockIdx.x / g.slot_tiles, first = blockIdx.x % g.slot_tiles * kTile;
  find_open(tile, w, batch, first);
  __syncthreads();
  float left = 1;
  for (int64_t n = g.token_tiles; n-- > 0;) {
    if (tid < kTile && tile.open[tid]) g.lefts[between(g, p, batch, n, first + tid)] = left;
    if (!leaves_traces(tile, w, g, batch, n, first)) continue;
    open_gates(tile, w, batch, n * kTile, first, nullptr);
    if (tid >= kTile) continue;
    for (int t = kTile; t-- > 0;) left *= left_by(tile.pairs.w[t][tid], tile.pairs.ds[t][tid], w.erase_scale);
  }
  if (tid < kTile) tile.left[tid] = left;
  __syncthreads();

  // A warp per slot: p_0 of the open ones, in pairs.lse, and dv of all.
  const char* values = p.values.batch(p.lead, batch);
  const char* upper = g.d_out.batch(p.lead, batch);
  char* d_values = g.d_values ? g.d_values.batch(p.lead, batch) : nullptr;
  for (int r = tid / 32; r < kTile; r += kPairThreads / 32) {
    const int64_t i = first + r;
    float sum = 0;
    for (int64_t c = lane; i < p.N && c < p.V; c += 32) {
      const float u = load(upper + i * g.d_out.row, g.d_out.dtype, c);
      if (tile.open[r]) sum += u * load(values + i * p.values.row, p.values.dtype, c);
      if (d_values != nullptr) reinterpret_cast<float*>(d_values + i * g.d_values.row)[c] = tile.left[r] * u;
    }
    sum = warp_sum(sum);
    if (lane == 0) tile.pairs.lse[r] = sum;
  }
  __syncthreads();
  float share = tid < kTile ? tile.pairs.lse[tid] : 0.f;
  for (int64_t n = 0; n < g.token_tiles; ++n) {
    if (!leaves_traces(tile, w, g, batch, n, first)) {
      share = 0;
      continue;
    }
    open_products(tile, w, g, batch, n * kTile, first);
    if (tid >= kTile) continue;
    if (tile.open[tid]) g.shares[between(g, p, batch, n, first + tid)] = share;
    for (int t = 0; t < kTile; ++t) {
      const float a = tile.pairs.w[t][tid];
      share = left_by(a, tile.pairs.ds[t][tid], w.erase_scale) * share + a * tile.pairs.a[t][tid];
    }
  }
}

// Fills tile.w and tile.ds; 0 for tokens that do not write and slots that are not open. `by_slots`: slots run along the rows.
template <bool by_slots>
MK_DEVICE void weigh(WeighTile& tile, const Writing& w, const Gradients& g, int64_t batch, int64_t n, int64_t i0) {
  const Pairs& p = w.pairs;
  GateTile& gates = tile.gates;
  const int slot = int(threadIdx.x);
  open_products(gates, w, g, batch, n * kTile, i0);
  if (slot < kTile) {
    const bool open = gates.open[slot];
    const int64_t i = i0 + slot;
    const float* deltas = g.deltas == nullptr ? nullptr : g.deltas + batch * p.lead.folded() * p.T + n * kTile;
    float left = 1, share = 0, faded = 0;  // faded: g retained
    if (open) {
      left = g.lefts[between(g, p, batch, n, i)], share = g.shares[between(g, p, batch, n, i)];
      if (g.d_retained) {
        faded = load(g.d_retained.batch(p.lead, batch) + i * g.d_retained.row, DType::f32, 0) *
                load(g.retained.batch(p.lead, batch) + i * g.retained.row, DType::f32, 0);
      }
    }
#pragma unroll 4
    for (int t = kTile; t-- > 0;) {
      gates.pairs.b[t][slot] = left;
      left *= left_by(gates.pairs.w[t][slot], gates.pairs.ds[t][slot], w.erase_scale);
    }
#pragma unroll 4
    for (int t = 0; t < kTile; ++t) {
      const float a = gates.pairs.w[t][slot], keep = gates.pairs.ds[t][slot];
      const float c = gates.pairs.a[t][slot], r = gates.pairs.b[t][slot];
      const bool writes = open && gates.pairs.a_rows[t] != nullptr;
      const float da = writes ? r * (c - w.erase_scale * share) : 0.f;
      (by_slots ? tile.w[t][slot] : tile.w[slot][t]) = a * r;
      const float delta = writes && deltas != nullptr ? deltas[t] : 0.f;
      (by_slots ? tile.ds[t][slot] : tile.ds[slot][t]) = writes ? score_gradient(w, a, keep, da, faded, delta) : 0.f;
      share = left_by(a, keep, w.erase_scale) * share + a * c;
    }
  }
  __syncthreads();
}

// delta of every token: the sum of its ds as they are without it. One block per 32 tokens.
MK_KERNEL(kPairThreads) sum_deltas(MK_PARAM(Writing) w, MK_PARAM(Gradients) g, float* deltas) {
  WeighTile& tile = *reinterpret_cast<WeighTile*>(shared_memory());
  const Pairs& p = w.pairs;
  const int tid = int(threadIdx.x);
  const int64_t n = blockIdx.x % g.token_tiles, batch = blockIdx.x / g.token_tiles;
  const int64_t tokens = p.lead.folded() * p.T, t = n * kTile + tid;
  float total = 0;
  for (int64_t i0 = 0; i0 < p.N; i0 += kTile) {
    __syncthreads();  // the tile of before is no longer used
    find_open(tile.gates, w, batch, i0);
    __syncthreads();
    weigh<false>(tile, w, g, batch, n, i0);
    for (int r = 0; tid < kTile && r < kTile; ++r) total += tile.ds[r][tid];
  }
  if (tid < kTile && t < tokens) deltas[batch * tokens + t] = total;
}

// Blocks of columns of K come first, then those of V.
MK_KERNEL(kPairThreads)
write_by_tokens(MK_PARAM(Writing) w, MK_PARAM(Gradients) g, int64_t blocks, int64_t key_blocks) {
  WeighTile& tile = *reinterpret_cast<WeighTile*>(shared_memory());
  const Pairs& p = w.pairs;
  const int64_t block = blockIdx.x % blocks, n = blockIdx.x / blocks % g.token_tiles;
  const int64_t batch = blockIdx.x / blocks / g.token_tiles;
  const bool of_query = block < key_blocks;
  const int64_t column = (of_query ? block : block - key_blocks) * kPairThreads + threadIdx.x;
  const View &rows = of_query ? p.keys : g.d_out, &result = of_query ? g.d_query : g.d_write;
  const bool mine = result && column < (of_query ? p.K : p.V);
  float acc[kTile] = {};
  for (int64_t i0 = 0; i0 < p.N; i0 += kTile) {
    __syncthreads();  // the tile of before is no longer used
    find_open(tile.gates, w, batch, i0);
    __syncthreads();
    if (!leaves_traces(tile.gates, w, g, batch, n, i0)) continue;
    weigh<false>(tile, w, g, batch, n, i0);
    point_open(tile.gates, w, batch, w.write, n * kTile, &rows, i0);
    if (mine) add_rows(of_query ? tile.ds : tile.w, tile.gates.pairs.b_rows, rows.dtype, column, acc);
  }
  point(tile.gates.pairs, p, batch, result, n * kTile, p.keys, 0);
#pragma unroll
  for (int r = 0; r < kTile; ++r) {
    if (!mine || tile.gates.pairs.a_rows[r] == nullptr) continue;
    reinterpret_cast<float*>(tile.gates.pairs.a_rows[r])[column] = (of_query ? float(p.scale) : 1.f) * acc[r];
  }
}

// The first block of columns also sums what is one number per slot.
MK_KERNEL(kPairThreads) write_by_slots(MK_PARAM(Writing) w, MK_PARAM(Gradients) g, int64_t blocks) {
  WeighTile& tile = *reinterpret_cast<WeighTile*>(shared_memory());
  const Pairs& p = w.pairs;
  const int tid = int(threadIdx.x);
  const int64_t block = blockIdx.x % blocks, first = blockIdx.x / blocks % g.slot_tiles * kTile;
  const int64_t batch = blockIdx.x / blocks / g.slot_tiles, column = block * kPairThreads + tid;
  const bool mine = g.d_keys && column < p.K;
  find_open(tile.gates, w, batch, first);
  __syncthreads();
  float acc[kTile] = {}, total = 0;
  for (int64_t n = 0; n < g.token_tiles; ++n) {
    if (!leaves_traces(tile.gates, w, g, batch, n, first)) continue;
    weigh<true>(tile, w, g, batch, n, first);
    point_open(tile.gates, w, batch, p.query, n * kTile, nullptr, first);
    if (mine) add_rows(tile.ds, tile.gates.pairs.a_rows, p.query.dtype, column, acc);
    if (tid < kTile) {
      for (int t = 0; t < kTile; ++t) total += tile.ds[t][tid];
    }
    if (g.d_weights && block == 0) {
      point(tile.gates.pairs, p, batch, g.d_weights, n * kTile, p.keys, 0);
      store_gates(tile.ds, tile.gates.pairs, first, p.N);
    }
  }
  if (mine) {
    char* row = g.d_keys.batch(p.lead, batch) + first * g.d_keys.row;
#pragma unroll
    for (int r = 0; r < kTile; ++r, row += g.d_keys.row) {
      if (first + r < p.N) reinterpret_cast<float*>(row)[column] = float(p.scale) * acc[r];
    }
  }
  if (g.d_mask && block == 0 && tid < kTile && first + tid < p.N) {
    *reinterpret_cast<float*>(g.d_mask.batch(p.lead, batch) + (first + tid) * g.d_mask.row) = total;
  }
}

}  // namespace

void gated_write_backward(const Device& device, const GatedWriteBackward& b) {
  const GatedWrite& f = b.forward;
  const char* name = name_of(f);
  const Writing w = writing_of(device, name, f);
  Gradients g{};
  g.d_out = b.d_out, g.retained = f.retained, g.d_retained = b.d_retained;
  g.d_values = b.d_values, g.d_keys = b.d_keys, g.d_mask = b.d_mask;
  g.d_query = b.d_query, g.d_write = b.d_write, g.d_weights = b.d_weights;
  g.token_tiles = div_up(f.lead.folded() * f.T, kTile), g.slot_tiles = div_up(f.N, kTile);
  const int64_t batches = f.lead.batches(), kept = batches * g.token_tiles * f.N;
  g.lefts = device.scratch<float>(kept), g.shares = device.scratch<float>(kept);
  launch(device, name, keep_between, batches * g.slot_tiles, kPairThreads, sizeof(GateTile), w, g);
  if (w.softmax != nullptr) {
    auto* deltas = device.scratch<float>(batches * f.lead.folded() * f.T);
    launch(device, name, sum_deltas, batches * g.token_tiles, kPairThreads, sizeof(WeighTile), w, g, deltas);
    g.deltas = deltas;
  }
  const int64_t keys = g.d_query ? div_up(f.K, kPairThreads) : 0;
  const int64_t all = keys + (g.d_write ? div_up(f.V, kPairThreads) : 0);
  launch(device, name, write_by_tokens, batches * g.token_tiles * all, kPairThreads, sizeof(WeighTile), w, g, all,
         keys);
  const int64_t by_slots = g.d_keys ? div_up(f.K, kPairThreads) : g.d_mask || g.d_weights ? 1 : 0;
  launch(device, name, write_by_slots, batches * g.slot_tiles * by_slots, kPairThreads, sizeof(WeighTile), w, g,
         by_slots);
}

}  // namespace mk::cuda
