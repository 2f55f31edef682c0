// gated_write, softmax_write and slot_write:  v_i <- v_i (1 - a[t, i] e_t) + a[t, i] w_t  for t = 1 .. T,   retained_i = prod_t (1 - a[t, i])
//
// A number e: every slot evolves alone, so with R[t, i] = prod_{u > t} (1 - e a[u, i])
//   v' = R[0] v + sum_t (a[t] R[t]) w_t
// Tiles of 32 tokens are walked from the last to the first. Per tile: gates by all threads (cuda/gates.h), then one lane per slot
// turns them into weights a R, keeping R in a register; then each thread owns one value column and 32 slots and adds the weighted
// rows of `write`. Every factor is at most 1, nothing is divided, and once R of all slots is 0 no earlier token can matter.
// A vector e_t: v stays in the same registers, and tokens are walked from the first to the last.
//
// One block per 32 slots and 128 value columns; blocks of columns each compute the gates again. Each block reads and writes its own
// numbers of the memory, so `out` may be `values`.
#include "cuda/gates.h"

namespace mk::cuda {
namespace {

struct Written {
  View out, retained;
};

template <bool vector>
MK_KERNEL(kPairThreads)
write_slots(MK_PARAM(Writing) w, MK_PARAM(Written) to, int64_t tiles, int64_t blocks) {
  GateTile& tile = *reinterpret_cast<GateTile*>(shared_memory());
  // Rows of the memory pass between dtypes and registers here, while the tile is not used.
  auto& rows = *reinterpret_cast<float(*)[kTile][kPairThreads]>(&tile.pairs);
  static_assert(sizeof rows <= sizeof tile.pairs);
  const Pairs& p = w.pairs;
  const int tid = int(threadIdx.x);
  const int64_t block = blockIdx.x % blocks, first = blockIdx.x / blocks % tiles * kTile;
  const int64_t batch = blockIdx.x / blocks / tiles, column = block * kPairThreads + tid;
  const int64_t tokens = p.lead.folded() * p.T, chunks = div_up(tokens, kTile);
  const int slots = int(least(kTile, p.N - first));
  const bool mine = column < p.V;
  const char* values = mine ? p.values.batch(p.lead, batch) + first * p.values.row : nullptr;

  find_open(tile, w, batch, first);
  __syncthreads();
  float acc[kTile] = {}, left = 1, kept = 1;
  if (vector) {
    for (int r = 0; r < kTile; ++r)
      rows[r][tid] = mine && r < slots ? load(values + r * p.values.row, p.values.dtype, column) : 0.f;
#pragma unroll
    for (int r = 0; r < kTile; ++r) acc[r] = rows[r][tid];
    __syncthreads();
  }
  for (int64_t n = 0; n < chunks; ++n) {
    open_gates(tile, w, batch, (vector ? n : chunks - 1 - n) * kTile, first, nullptr);
    if (tid < kTile) {
      for (int j = 0; j < kTile; ++j) {
        const int t = vector ? j : kTile - 1 - j;
        const float a = tile.pairs.w[t][tid], keep = tile.pairs.ds[t][tid];
        kept *= keep;
        if (!vector) tile.pairs.w[t][tid] = a * left, left *= left_by(a, keep, w.erase_scale);
      }
      const bool alive = vector || __any_sync(kAllLanes, tile.open[tid] && left != 0);
      if (tid == 0) tile.alive = alive;
    }
    __syncthreads();
    if (mine && !vector) add_rows(tile.pairs.w, tile.pairs.a_rows, w.write.dtype, column, acc);
    for (int j = 0; vector && mine && j < kTile; ++j) {
      if (tile.pairs.a_rows[j] == nullptr) continue;
      const float x = load(tile.pairs.a_rows[j], w.write.dtype, column),
                  e = load(tile.erase_rows[j], w.erase.dtype, column);
#pragma unroll
      for (int r = 0; r < kTile; ++r) {
        const float a = tile.pairs.w[j][r];
        acc[r] = a * x + (1.f - a * e) * acc[r];
      }
    }
    if (!tile.alive) break;
  }

  if (tid < kTile) {
    tile.left[tid] = left;
    if (block == 0 && tid < slots) {
      *reinterpret_cast<float*>(to.retained.batch(p.lead, batch) + (first + tid) * to.retained.row) = kept;
    }
  }
  __syncthreads();
  if (!mine) return;
#pragma unroll
  for (int r = 0; r < kTile; ++r) rows[r][tid] = acc[r];
  char* out = to.out.batch(p.lead, batch) + first * to.out.row;
  for (int r = 0; r < slots; ++r) {
    const float v = load(values + r * p.values.row, p.values.dtype, column);
    const float x = !tile.open[r] ? v : vector ? rows[r][tid] : tile.left[r] * v + rows[r][tid];
    store(out + r * to.out.row, to.out.dtype, column, x);
  }
}

template <bool vector>
void write(const Device& device, const GatedWrite& g) {
  const char* name = name_of(g);
  const int64_t tiles = div_up(g.N, kTile), blocks = most(1, div_up(g.V, kPairThreads));
  launch(device, name, write_slots<vector>, g.lead.batches() * tiles * blocks, kPairThreads, sizeof(GateTile),
         writing_of(device, name, g), Written{g.out, g.retained}, tiles, blocks);
}

}  // namespace

void gated_write(const Device& device, const GatedWrite& g) { write<false>(device, g); }
void gated_write_scan(const Device& device, const GatedWrite& g) { write<true>(device, g); }

}  // namespace mk::cuda
