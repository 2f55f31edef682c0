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

struct alignas(16) Shared {
  int64_t batch, first, column0;  // the first slot and value column
  int columns;                    // of values
  Bases bases;
  float added[kRows], left[kRows], kept[kRows];
  bool alive[kThreads / 32];  // R of some slot of this warp is not 0
  Tokens<S> tile[2];          // this one and the next
};

// Finds the block's position in the call, the mask's terms of its slots and its first tile. Ends with a barrier.
MK_DEVICE void locate(Shared& block, const Tiling& r) {
  const Pairs& p = r.w.pairs;
  const int tid = int(threadIdx.x);
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
  if (r.token_tiles > 0) {
    look_up(block.tile[(r.token_tiles - 1) % 2], r.w, r.views, block.bases, block.batch, (r.token_tiles - 1) * S);
  }
  __syncthreads();
}

// Loads the keys of the slots, once or with every part of the queries, and the rows of the tokens: the parts of the
// queries of a tile, then the rows that its tokens write. Each is prefetched one step ahead.
template <class M>
struct Loader {
  using X = Stored<M>;
  static constexpr int kPart = kPartBytes / int(sizeof(X));

  const Tiling& r;
  Shared& block;
  Buffers buffers;
  char* held_keys;  // [64, K], if they stay
  bool given = bool(r.w.pairs.weights);

  MK_DEVICE const char* key_row(int i) const {
    if (block.added[i] == -kInfinity) return nullptr;
    return block.bases.of[kKeys] + (block.first + i) * r.w.pairs.keys.row;
  }

  // Starts the copy of the keys that stay; they arrive with the first part.
  MK_DEVICE void prefetch_held() const {
    start_rows<X>(int(threadIdx.x), kRows, r.views, r.keys, 0, r.w.pairs.K, held_keys, r.key_pitch,
                  [&](int i) { return key_row(i); });
  }

  // Starts the copy of part `part` of tile n: queries [S, part], or given gates [S, 64], and keys [64, part] if they do
  // not stay. After the last part: rows of `write`, [S, columns].
  MK_DEVICE void prefetch(int64_t n, int part) {
    const int tid = opaque(int(threadIdx.x));
    const bool scored = part < r.key_parts;
    const char* const* rows = scored ? block.tile[n % 2].query : block.tile[n % 2].write;
    char* buffer = buffers.next();
    const int64_t at = !scored ? block.column0 : given ? block.first : int64_t(part) * kPart;
    start_rows<X>(tid, S, r.views, scored ? r.query : r.write, at, scored ? r.part : r.width, buffer,
                  scored ? r.part_pitch : r.write_pitch, [&](int i) { return rows[i]; });
    if (scored && !r.held) {
      start_rows<X>(tid, kRows, r.views, r.keys, at, kPart, buffer + S * r.part_pitch, r.part_pitch,
                    [&](int i) { return key_row(i); });
    }
    commit_copies();
  }

  // Waits for part `part` of the queries of tile n, and prefetches what follows. The tile after it is looked up.
  MK_DEVICE const char* arrived(int64_t n, int part) {
    const char* here = buffers.arrived();
    if (part == 0 && n > 0) look_up(block.tile[(n - 1) % 2], r.w, r.views, block.bases, block.batch, (n - 1) * S);
    prefetch(n, part + 1);
    return here;
  }
};

// sums [16, S] += products of a warp's 16 slots and S tokens along the columns of a part.
template <class M>
MK_DEVICE void add_part(Sums<M> (&sums)[S / 8], const Loader<M>& loader, const char* buffer, int part) {
  using X = Stored<M>;
  const Tiling& r = loader.r;
  const int warp = int(threadIdx.x) / 32;
  const int64_t at = int64_t(part) * loader.kPart;
  const char* keys = r.held ? loader.held_keys + warp * 16 * r.key_pitch : buffer + (S + warp * 16) * r.part_pitch;
  add_products<M, S>(sums, keys, r.held ? r.key_pitch : r.part_pitch, r.held ? part * kPartBytes : 0, buffer,
                     r.part_pitch, int(least(loader.kPart, r.w.pairs.K - at) * sizeof(X)));
}

// The slots and tokens of a tile that a lane has: x[j][i] of [S / 8][4] is of slot slot(i) of the block and of token
// token(j, i) of the tile.
struct Places {
  int lane = opaque(int(threadIdx.x)) % 32;
  int own = opaque(int(threadIdx.x)) / 32 * 16 + lane / 4;  // the first slot; the second is 8 further on

  MK_DEVICE int slot(int i) const { return own + i / 2 * 8; }
  MK_DEVICE int token(int j, int i) const { return j * 8 + lane % 4 * 2 + i % 2; }
};

// x = <k, q>, or the given gates, of a warp's 16 slots and tile n: [16, S]. Rows of tokens that do not write are zero.
template <class M>
MK_DEVICE void score_tile(float (&x)[S / 8][4], Loader<M>& loader, int64_t n, bool busy) {
  const Tiling& r = loader.r;
  Sums<M> sums[S / 8];
  for (int part = 0; part < r.key_parts; ++part) {
    const char* buffer = loader.arrived(n, part);
    if (!busy) continue;
    if (!loader.given) {
      add_part(sums, loader, buffer, part);
      continue;
    }
    const Places at;
#pragma unroll
    for (int j = 0; j < S / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const char* row = buffer + at.token(j, i) * r.part_pitch;
        sums[j].x[i] = to_float(reinterpret_cast<const Stored<M>*>(row)[at.slot(i)]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < S / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[j][i] = sums[j][i];
  }
}

// What is carried along the tokens for a lane's two slots: R, and the product of 1 - a over this lane's tokens. Four
// neighbouring lanes share the two slots.
struct Suffix {
  Gates gates;
  float left[2] = {1, 1}, kept[2] = {1, 1};

  // Turns x = <k, q> [16, S] into gates a, then, by a scan along the tokens, into weights a R. Returns whether R of a
  // slot of this warp is not 0.
  MK_DEVICE bool weigh(float (&x)[S / 8][4], const Writing& w, const Shared& block, const Tokens<S>& tokens) {
    const Places at;
    to_gates<S>(
        x, w, tokens, block.first, [&](int j, int i) { return at.token(j, i); }, [&](int, int i) { return at.slot(i); },
        [&](int, int i) { return block.added[at.slot(i)]; });
#pragma unroll
    for (int j = S / 8; j-- > 0;) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float &x0 = x[j][2 * row], &x1 = x[j][2 * row + 1];
        const float a0 = gates.open(x0), a1 = gates.open(x1), keep0 = gates.keep(x0), keep1 = gates.keep(x1);
        const float f0 = left_by(a0, keep0, w.erase_scale), f1 = left_by(a1, keep1, w.erase_scale);
        float r0, r1;
        leave(at.lane, f0, f1, left[row], r0, r1);
        x0 = a0 * r0, x1 = a1 * r1;
        kept[row] *= keep0 * keep1;
      }
    }
    const bool open = block.added[at.own] != -kInfinity, open_below = block.added[at.own + 8] != -kInfinity;
    return __any_sync(kAllLanes, (open && left[0] != 0) || (open_below && left[1] != 0));
  }

  // Multiplies `kept` over the lanes of a slot.
  MK_DEVICE void finish() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      kept[row] *= __shfl_xor_sync(kAllLanes, kept[row], 1);
      kept[row] *= __shfl_xor_sync(kAllLanes, kept[row], 2);
    }
  }
};

// The sums of a thread in double, in scratch memory.
struct LongSums {
  bool begun = false;

  MK_DEVICE static double* own(const Tiling& r) {
    return r.long_sums + int64_t(blockIdx.x) * (kColumns / 2 * kThreads) + opaque(int(threadIdx.x));
  }

  // Adds the sums in float to them; these restart at 0.
  MK_DEVICE void move(float (&acc)[kColumns / 8][4], const Tiling& r) {
    double* sums = own(r);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      sums[i * kThreads] = (begun ? sums[i * kThreads] : 0.) + acc[i / 4][i % 4];
      acc[i / 4][i % 4] = 0;
    }
    begun = true;
  }

  // Adds them to the sums in float.
  MK_DEVICE void add_to(float (&acc)[kColumns / 8][4], const Tiling& r) const {
    if (!begun) return;
    const double* sums = own(r);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) acc[i / 4][i % 4] = float(sums[i * kThreads] + acc[i / 4][i % 4]);
  }
};

// Stores the rows [columns] of a warp's 16 slots, v' = R v + acc, and their `retained`. Through `buffers`, where a loop
// may index; registers cannot be indexed at run time.
MK_DEVICE void store_slots(const Tiling& r, Shared& block, char* buffers, const float (&acc)[kColumns / 8][4],
                           const Suffix& suffix) {
  const Pairs& p = r.w.pairs;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, own = warp * 16 + lane / 4;
  __syncthreads();
  auto& sums = *reinterpret_cast<float(*)[kRows][kColumns + 4]>(buffers);
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i)
    sums[own + i % 4 / 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2] = acc[i / 4][i % 4];
  if (lane % 4 == 0) {
    block.left[own] = suffix.left[0], block.left[own + 8] = suffix.left[1];
    block.kept[own] = suffix.kept[0], block.kept[own + 8] = suffix.kept[1];
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
MK_KERNEL_BLOCKS(kThreads, 3)
write_slots(MK_PARAM(Tiling) r) {
  constexpr int kSteps = S * int(sizeof(Stored<M>)) / 32;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  Shared& block = *reinterpret_cast<Shared*>(shared_memory());
  char* buffers = shared_memory() + sizeof(Shared);
  locate(block, r);
  Loader<M> loader{r, block, {buffers, r.buffer_bytes}, buffers + kBuffers * r.buffer_bytes};
  if (r.held) loader.prefetch_held();
  if (r.token_tiles > 0) loader.prefetch(r.token_tiles - 1, 0);

  Suffix suffix{{loader.given}};
  LongSums long_sums;
  float acc[kColumns / 8][4] = {};                    // [16, columns] of a warp
  bool busy = block.first + warp * 16 < r.w.pairs.N;  // this warp has a slot that remembers
  for (int64_t n = r.token_tiles; n-- > 0;) {
    float x[S / 8][4], drop[2];
    score_tile(x, loader, n, busy);
    const bool weighs = busy;
    if (weighs) busy = suffix.weigh(x, r.w, block, block.tile[n % 2]);
    if (opaque(lane) == 0) block.alive[warp] = busy;
    lift_rows<M, S>(x, drop);
    Left<M> weights[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) weights[step] = weights_left<M>(x, step);

    const char* rows = loader.buffers.arrived();
    const bool more = n > 0 && (block.alive[0] || block.alive[1] || block.alive[2] || block.alive[3]);
    if (more) loader.prefetch(n - 1, 0);
    if (weighs) {
      add_weighted<M, kSteps, kColumns>(acc, weights, drop, rows, r.write_pitch, block.columns, opaque(lane));
    }
    if (r.long_sums != nullptr && (r.token_tiles - n) % kRun == 0) long_sums.move(acc, r);
    if (!more) break;
  }
  wait_copies<0>();

  long_sums.add_to(acc, r);
  suffix.finish();
  store_slots(r, block, buffers, acc, suffix);
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
