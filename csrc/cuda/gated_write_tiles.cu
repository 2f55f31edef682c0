// gated_write, softmax_write and slot_write with a number e as erase, on the tensor cores. Every slot evolves alone, so
// with the suffix products R[t, i] = prod_{u > t} (1 - e a[u, i])
//   v' = R[0] v + sum_t (a[t] R[t]) w_t,   retained_i = prod_t (1 - a[t, i])
//
// A block of four warps has 64 slots, 16 per warp, and up to 128 value columns in registers. It walks tiles of tokens
// from the last to the first. Queries, in parts of 256 bytes, and rows of `write` alternate between two buffers:
// cp.async fills one while the other is multiplied. Keys stay in shared memory; if they are too wide, they are loaded
// again with every part of the queries. Scores stay in registers. There they become gates, then weights a R by a scan
// along the tokens, then the left operand of the second product. Four neighbouring lanes share a slot and exchange
// products of 1 - e a by shuffles. R is carried from tile to tile in a register. Every factor is at most 1, nothing is
// divided, and once R of all slots of a block is 0, earlier tokens are skipped.
//
// After every kRun tiles the sums move from registers to doubles in scratch memory: a float that has grown far beyond
// the terms of one tile would round all later terms in the same direction.
//
// Each block of columns computes the gates again. Each block reads and writes only its own numbers of the memory, so
// `out` may be `values`.
#include "cuda/tiles/buffers.h"
#include "cuda/tiles/gate_fragments.h"

namespace mk::cuda {
namespace {

struct Tiling {
  Writing w;
  Views views;
  View out, retained;
  Rows query, keys, write;
  int64_t slot_tiles, token_tiles;  // per batch
  int value_blocks, width;          // width: value columns of every block but the last
  int key_parts, part;              // parts of a query row, and columns of a part
  int key_pitch, part_pitch, write_pitch, buffer_bytes;
  bool held;          // keys stay in shared memory
  double* long_sums;  // [blocks][numbers of a thread][threads]; null: at most kRun tiles
};

constexpr int S = 32;      // tokens of a tile; with more, registers would spill
constexpr int kRun = 128;  // tiles that are summed in float

// Where a thread sums its numbers in double.
MK_DEVICE double* own_long_sums(const Tiling& r) {
  return r.long_sums + int64_t(blockIdx.x) * (kColumns / 2 * kThreads) + opaque(int(threadIdx.x));
}

struct alignas(16) Shared {
  int64_t batch, first, column0;  // the first slot and value column
  int columns;                    // of values
  Bases bases;
  float added[kRows], left[kRows], kept[kRows];
  bool alive[kThreads / 32];  // R of some slot of this warp is not 0
  Tokens<S> tile[2];          // this one and the next
};

template <class M>
MK_KERNEL_BLOCKS(kThreads, 3)
write_slots(MK_PARAM(Tiling) r) {
  using X = Stored<M>;
  constexpr int kSteps = S * int(sizeof(X)) / 32, kPart = kPartBytes / int(sizeof(X));
  const Writing& w = r.w;
  const Pairs& p = w.pairs;
  const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const bool given = bool(p.weights);
  Shared& block = *reinterpret_cast<Shared*>(shared_memory());
  char* buffers = shared_memory() + sizeof(Shared);
  char* held_keys = buffers + kBuffers * r.buffer_bytes;
  if (tid == 0) {
    int64_t at = blockIdx.x;
    block.column0 = at % r.value_blocks * r.width;
    at /= r.value_blocks;
    block.first = at % r.slot_tiles * kRows, block.batch = at / r.slot_tiles;
    block.columns = int(least(r.width, p.V - block.column0));
  }
  __syncthreads();
  find_bases(block.bases, r.views, p.lead, block.batch);
  __syncthreads();
  if (tid < kRows) block.added[tid] = added_to(p, block.bases.of[kMask], block.first + tid);
  if (r.token_tiles > 0)
    look_up(block.tile[(r.token_tiles - 1) % 2], w, r.views, block.bases, block.batch, (r.token_tiles - 1) * S);
  __syncthreads();

  auto key_row = [&](int i) -> const char* {
    return block.added[i] == -kInfinity ? nullptr : block.bases.of[kKeys] + (block.first + i) * p.keys.row;
  };
  if (r.held) start_rows<X>(tid, kRows, r.views, r.keys, 0, p.K, held_keys, r.key_pitch, key_row);
  // Rows alternate between the buffers: the parts of the queries of a tile, then the rows that its tokens write. Each
  // copy starts one step ahead.
  int turn = 0;
  auto start_copy = [&](int64_t n, int part) {
    const int tid = opaque(int(threadIdx.x));
    const bool scored = part < r.key_parts;
    const char* const* rows = scored ? block.tile[n % 2].query : block.tile[n % 2].write;
    char* buffer = buffers + turn * r.buffer_bytes;
    turn ^= 1;
    const int64_t at = !scored ? block.column0 : given ? block.first : int64_t(part) * kPart;
    start_rows<X>(tid, S, r.views, scored ? r.query : r.write, at, scored ? r.part : r.width, buffer,
                  scored ? r.part_pitch : r.write_pitch, [&](int i) { return rows[i]; });
    if (scored && !r.held) {
      start_rows<X>(tid, kRows, r.views, r.keys, at, kPart, buffer + S * r.part_pitch, r.part_pitch, key_row);
    }
    commit_copies();
  };
  if (r.token_tiles > 0) start_copy(r.token_tiles - 1, 0);

  // This lane's first slot is warp * 16 + lane / 4; its second is 8 further on.
  const Gates gates{given};
  float acc[kColumns / 8][4] = {}, left[2] = {1, 1}, kept[2] = {1, 1};
  bool busy = block.first + warp * 16 < p.N, aside = false;  // aside: the sums in double have begun
  for (int64_t n = r.token_tiles; n-- > 0;) {
    float x[S / 8][4];
    {
      Sums<M> sums[S / 8];
      for (int part = 0; part < r.key_parts; ++part) {
        wait_copies<0>();
        __syncthreads();
        const char* buffer = buffers + (turn ^ 1) * r.buffer_bytes;
        if (part == 0 && n > 0) look_up(block.tile[(n - 1) % 2], w, r.views, block.bases, block.batch, (n - 1) * S);
        start_copy(n, part + 1);
        if (!busy) continue;
        if (given) {
          const int lane = opaque(int(threadIdx.x)) % 32, own = opaque(int(threadIdx.x)) / 32 * 16 + lane / 4;
          // Rows of tokens that do not write are zero.
#pragma unroll
          for (int j = 0; j < S / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const char* row = buffer + (j * 8 + lane % 4 * 2 + i % 2) * r.part_pitch;
              sums[j].x[i] = to_float(reinterpret_cast<const X*>(row)[own + i / 2 * 8]);
            }
          }
          continue;
        }
        const int64_t at = int64_t(part) * kPart;
        const char* rows = r.held ? held_keys + warp * 16 * r.key_pitch : buffer + (S + warp * 16) * r.part_pitch;
        add_products<M, S>(sums, rows, r.held ? r.key_pitch : r.part_pitch, r.held ? part * kPartBytes : 0, buffer,
                           r.part_pitch, int(least(kPart, p.K - at) * sizeof(X)));
      }
#pragma unroll
      for (int j = 0; j < S / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[j][i] = sums[j][i];
      }
    }
    const bool weighs = busy;
    if (weighs) {
      const int lane = opaque(int(threadIdx.x)) % 32, own = opaque(int(threadIdx.x)) / 32 * 16 + lane / 4;
      auto slot = [&](int, int i) { return own + i / 2 * 8; };
      to_gates<S>(
          x, w, block.tile[n % 2], block.first, [&](int j, int i) { return j * 8 + lane % 4 * 2 + i % 2; }, slot,
          [&](int j, int i) { return block.added[slot(j, i)]; });
#pragma unroll
      for (int j = S / 8; j-- > 0;) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          float &x0 = x[j][2 * row], &x1 = x[j][2 * row + 1];
          const float a0 = gates.open(x0), a1 = gates.open(x1), keep0 = gates.keep(x0), keep1 = gates.keep(x1);
          const float f0 = left_by(a0, keep0, w.erase_scale), f1 = left_by(a1, keep1, w.erase_scale);
          float r0, r1;
          leave(lane, f0, f1, left[row], r0, r1);
          x0 = a0 * r0, x1 = a1 * r1;
          kept[row] *= keep0 * keep1;
        }
      }
      const bool open = block.added[own] != -kInfinity, open_below = block.added[own + 8] != -kInfinity;
      busy = __any_sync(kAllLanes, (open && left[0] != 0) || (open_below && left[1] != 0));
    }
    if (opaque(lane) == 0) block.alive[warp] = busy;
    float drop[2];
    lift_rows<M, S>(x, drop);
    Left<M> weights[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) weights[step] = weights_left<M>(x, step);

    wait_copies<0>();
    __syncthreads();
    const char* buffer = buffers + (turn ^ 1) * r.buffer_bytes;
    const bool more = n > 0 && (block.alive[0] || block.alive[1] || block.alive[2] || block.alive[3]);
    if (more) start_copy(n - 1, 0);
    if (weighs) {
      add_weighted<M, kSteps, kColumns>(acc, weights, drop, buffer, r.write_pitch, block.columns, opaque(lane));
    }
    if (r.long_sums != nullptr && (r.token_tiles - n) % kRun == 0) {
      double* sums = own_long_sums(r);
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) {
        sums[i * kThreads] = (aside ? sums[i * kThreads] : 0.) + acc[i / 4][i % 4];
        acc[i / 4][i % 4] = 0;
      }
      aside = true;
    }
    if (!more) break;
  }
  wait_copies<0>();
  if (aside) {
    const double* sums = own_long_sums(r);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) acc[i / 4][i % 4] = float(sums[i * kThreads] + acc[i / 4][i % 4]);
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    kept[row] *= __shfl_xor_sync(kAllLanes, kept[row], 1);
    kept[row] *= __shfl_xor_sync(kAllLanes, kept[row], 2);
  }
  // Through shared memory, where a loop may index; registers cannot be indexed at run time.
  __syncthreads();
  const int own = warp * 16 + lane / 4;
  auto& sums = *reinterpret_cast<float(*)[kRows][kColumns + 4]>(buffers);
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i)
    sums[own + i % 4 / 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2] = acc[i / 4][i % 4];
  if (lane % 4 == 0) {
    block.left[own] = left[0], block.left[own + 8] = left[1];
    block.kept[own] = kept[0], block.kept[own + 8] = kept[1];
  }
  __syncwarp();
  for (int row = warp * 16; row < warp * 16 + 16; ++row) {
    const int64_t i = block.first + row, batch = block.batch;
    if (i >= p.N) break;
    if (block.column0 == 0 && lane == 0) {
      *reinterpret_cast<float*>(r.retained.batch(p.lead, batch) + i * r.retained.row) = block.kept[row];
    }
    const bool open = block.added[row] != -kInfinity;
    const char* values = p.values.batch(p.lead, batch) + i * p.values.row;
    char* out = r.out.batch(p.lead, batch) + i * r.out.row;
    for (int column = lane; column < block.columns; column += 32) {
      const float v = load(values, p.values.dtype, block.column0 + column);
      store(out, r.out.dtype, block.column0 + column, open ? block.left[row] * v + sums[row][column] : v);
    }
  }
}

template <class M>
void write(const Device& device, const char* name, Tiling& r) {
  using X = Stored<M>;
  const Pairs& p = r.w.pairs;
  r.slot_tiles = div_up(p.N, kRows), r.token_tiles = div_up(p.lead.folded() * p.T, S);
  r.value_blocks = int(most(1, div_up(p.V, kColumns)));
  r.width = int(round_up(div_up(p.V, r.value_blocks), 16));
  r.part = p.weights ? kRows : kPartBytes / int(sizeof(X));
  r.key_parts = p.weights ? 1 : int(most(1, div_up(p.K, r.part)));
  r.part_pitch = tile_pitch<X>(least(r.query.width, r.part)), r.write_pitch = tile_pitch<X>(least(r.width, p.V));
  const int64_t writes = int64_t(S) * r.write_pitch, pitch = round_up(p.K, 16) * int64_t(sizeof(X)) + 16;
  auto shared = [&](bool held) {
    r.buffer_bytes = int(most((held ? S : S + kRows) * int64_t(r.part_pitch), writes));
    const int64_t rows = kBuffers * int64_t(r.buffer_bytes) + (held ? kRows * pitch : 0);
    return int64_t(sizeof(Shared)) + most(rows, kRows * (kColumns + 4) * int64_t(sizeof(float)));
  };
  r.held = shared(true) <= device.shared;
  r.key_pitch = r.held ? int(pitch) : 0;
  const int64_t blocks = p.lead.batches() * r.slot_tiles * r.value_blocks;
  if (r.token_tiles > kRun) r.long_sums = device.scratch<double>(blocks * (kColumns / 2 * kThreads));
  launch(device, name, write_slots<M>, blocks, kThreads, shared(r.held), r);
}

}  // namespace

void gated_write(const Device& device, const GatedWrite& g) {
  const char* name = name_of(g);
  Tiling r{};
  r.w = writing_of(device, name, g), r.views = views_of(r.w);
  const Pairs& p = r.w.pairs;
  r.out = g.out, r.retained = g.retained;
  r.query = rows_of(r.views, kQuery, p.lead, p.weights ? p.N : p.K), r.keys = rows_of(r.views, kKeys, p.lead, p.K);
  r.write = rows_of(r.views, kWrite, p.lead, p.V);
  const View keys = p.weights ? View{} : p.keys;
  with_arithmetic(device, r.w, {&r.views.of[kQuery], &keys, &r.w.write}, [&]<class M>() { write<M>(device, name, r); });
}

}  // namespace mk::cuda
