// gated_write, softmax_write and slot_write with an erase vector:
//   v_i <- v_i (1 - a[t, i] e_t) + a[t, i] w_t  for t = 1 .. T,   retained_i = prod_t (1 - a[t, i])
//
// One block per 32 slots and 128 value columns; each thread has one column of the 32 slots in registers. Tiles of 32 tokens are
// walked from the first to the last. Per tile: gates by all threads (cuda/tiles/gates.h), then every thread takes token after token. Blocks
// of columns each compute the gates again. Each block reads and writes its own numbers of the memory, so `out` may be `values`.
#include "cuda/tiles/gates.h"
#include "params/gated_write.h"

namespace mk::cuda {
namespace {

struct Written {
  View out, retained;
};

MK_KERNEL(kPairThreads)
scan_slots(MK_PARAM(Writing) w, MK_PARAM(Written) to, int64_t tiles, int64_t blocks) {
  GateTile& tile = *reinterpret_cast<GateTile*>(shared_memory());
  // Rows of the memory pass between dtypes and registers here, while the tile is not used.
  auto& rows = *reinterpret_cast<float(*)[kTile][kPairThreads]>(&tile.pairs);
  static_assert(sizeof rows <= sizeof tile.pairs);
  const Pairs& p = w.pairs;
  const int tid = int(threadIdx.x);
  const int64_t block = blockIdx.x % blocks, first = blockIdx.x / blocks % tiles * kTile;
  const int64_t batch = blockIdx.x / blocks / tiles, column = block * kPairThreads + tid;
  const int64_t chunks = div_up(p.lead.folded() * p.T, kTile);
  const int slots = int(least(kTile, p.N - first));
  const bool mine = column < p.V;
  const char* values = mine ? p.values.batch(p.lead, batch) + first * p.values.row : nullptr;

  find_open(tile, w, batch, first);
  __syncthreads();
  float acc[kTile], kept = 1;
  for (int r = 0; r < kTile; ++r) {
    rows[r][tid] = mine && r < slots ? load(values + r * p.values.row, p.values.dtype, column) : 0.f;
  }
#pragma unroll
  for (int r = 0; r < kTile; ++r) acc[r] = rows[r][tid];
  __syncthreads();
  for (int64_t n = 0; n < chunks; ++n) {
    open_gates(tile, w, batch, n * kTile, first, nullptr);
    for (int t = 0; tid < kTile && t < kTile; ++t) kept *= tile.pairs.ds[t][tid];
    for (int t = 0; mine && t < kTile; ++t) {
      if (tile.pairs.a_rows[t] == nullptr) continue;
      const float x = load(tile.pairs.a_rows[t], w.write.dtype, column),
                  e = load(tile.erase_rows[t], w.erase.dtype, column);
#pragma unroll
      for (int r = 0; r < kTile; ++r) {
        const float a = tile.pairs.w[t][r];
        acc[r] = a * x + (1.f - a * e) * acc[r];
      }
    }
  }

  if (block == 0 && tid < slots) {
    *reinterpret_cast<float*>(to.retained.batch(p.lead, batch) + (first + tid) * to.retained.row) = kept;
  }
  __syncthreads();
  if (!mine) return;
#pragma unroll
  for (int r = 0; r < kTile; ++r) rows[r][tid] = acc[r];
  char* out = to.out.batch(p.lead, batch) + first * to.out.row;
  for (int r = 0; r < slots; ++r) {
    const float v = load(values + r * p.values.row, p.values.dtype, column);
    store(out + r * to.out.row, to.out.dtype, column, tile.open[r] ? rows[r][tid] : v);
  }
}

}  // namespace

void gated_write_scan(const Device& device, const GatedWrite& g) {
  const char* name = name_of(g);
  const int64_t tiles = div_up(g.N, kTile), blocks = most(1, div_up(g.V, kPairThreads));
  launch(device, name, scan_slots, g.lead.batches() * tiles * blocks, kPairThreads, sizeof(GateTile),
         writing_of(device, name, g), Written{g.out, g.retained}, tiles, blocks);
}

}  // namespace mk::cuda
