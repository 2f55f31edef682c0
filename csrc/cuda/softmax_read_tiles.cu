// softmax_read for many tokens: products on the tensor cores.
//
// A block of four warps has 64 tokens, 16 per warp, up to 128 value columns, and a range of slots in tiles of S. Per
// tile a warp does
//   score     s = scale q k^T + mask   [16, S]; key rows are loaded in parts of 128 columns
//   weigh     p = exp(s - m)           [16, S]; m and l of the online softmax are carried from tile to tile
//   multiply  acc = fade acc + p v     [16, columns]
// Rows of keys and of values alternate between two buffers: cp.async fills one while the other is multiplied. Scores
// stay in registers. There they become p, then the left operand of the second product. Queries stay in registers too if
// they and the values are 16-bit and they are one part wide, else in shared memory.
//
// Scores are natural, not in base 2: scores far from 0 would lose digits that lse needs. l sums p before p is rounded
// to 16 bits, because lse is float32 whatever the dtype; the roundings of p average out in the read. For float16, p is
// multiplied by 2^15: with values up to 1 it would lose all that is below 2^-25.
//
// Where tokens have ranges of their own, a block leaves out tiles of which none of its tokens may address a slot. A
// product that is not finite is made again without the slots that a token may not address.
//
// The ranges of blocks end as in softmax_read.cu, which merges them.
#include "cuda/tiles/query_tiles.h"
#include "cuda/tiles/read_ranges.h"

namespace mk::cuda {
namespace {

constexpr int kColumns = 128;
constexpr int kSteps = 4;  // depth steps of the second product

struct Tiling {
  SoftmaxRead p;
  Ranges ranges;
  int64_t tiles;  // of tokens, per batch
  int value_blocks;
  int width;      // value columns of every block but the last
  int key_parts;  // of a key row
  int query_pitch, key_pitch, value_pitch, buffer_bytes;
  bool query_packs, key_packs, value_packs;
  int ranges_at;  // bytes of shared memory in front of the ranges of the tokens; 0: there are none
};

// The arithmetic of the product of p and values.
template <class M, class W>
using Second = std::conditional_t<std::is_same_v<Stored<M>, W>, M, tf32>;
// S: a tile of values has 128 bytes per column.
template <class W>
constexpr int kSlots = 128 / int(sizeof(W));
// p is multiplied by 2^kLift.
template <class P>
constexpr int kLift = std::is_same_v<P, f16> ? 15 : 0;

// May queries stay in registers? Those of float32 are too large, and beside float32 values it is not worth one more
// kernel.
template <class M, class W>
constexpr bool kMayHold = sizeof(Stored<M>) == 2 && sizeof(W) == 2;

// May tokens have ranges? No part of a product of exact float32 is made again, registers would spill: it is streamed.
template <class P>
constexpr bool kRanged = !std::is_same_v<P, float>;

// What a block keeps in shared memory beside rows, to save registers: its position in the call, the memory of its
// batch, and the mask's terms in the scores of the tile.
template <int S>
struct alignas(16) Shared {
  int64_t t0, batch, split, column0;  // the first token, of the batch; the range of slots; the first value column
  int64_t begin, end;                 // slots of the range that are looked at, from the beginning of a tile on
  int columns;                        // of values
  const char *keys, *values, *mask;
  float added[S];
};

// Thread 0: finds the block's position in the call. Ends with a barrier.
template <class W, int S>
MK_DEVICE void locate(Shared<S>& block, const Tiling& r) {
  const SoftmaxRead& p = r.p;
  if (threadIdx.x == 0) {
    int64_t at = blockIdx.x;
    block.t0 = at % r.tiles * kTokens;
    at /= r.tiles;
    block.column0 = at % r.value_blocks * r.width;
    at /= r.value_blocks;
    block.split = at % r.ranges.splits, block.batch = at / r.ranges.splits;
    block.begin = block.split * r.ranges.split_rows, block.end = least(p.N, block.begin + r.ranges.split_rows);
    block.columns = int(least(r.width, p.V - block.column0));
    block.keys = p.keys.batch(p.lead, block.batch);
    block.values = p.V > 0 ? p.values.batch(p.lead, block.batch) + block.column0 * int64_t(sizeof(W)) : nullptr;
    block.mask = p.mask ? p.mask.batch(p.lead, block.batch) : nullptr;
  }
  __syncthreads();
}

// Loads the rows of slots: the parts of the keys of a tile, then its values. Each is prefetched one step ahead.
template <class X, class W>
struct Loader {
  static constexpr int S = kSlots<W>;
  const Tiling& r;
  Shared<S>& block;
  Buffers buffers;

  // Keys of slots [first, first + S), columns of part `part`: [S, 128]. None past the range.
  MK_DEVICE void prefetch_keys(int64_t first, int part) {
    const SoftmaxRead& p = r.p;
    const int tid = int(threadIdx.x);
    const int64_t end = block.end;
    char* buffer = buffers.next();
    if (first < end) {
      const char* from = block.keys + part * kColumns * int64_t(sizeof(X));
      copy_rows<X, kThreads>(tid, S, least(kColumns, p.K - part * kColumns), r.key_packs, from, buffer, r.key_pitch,
                             [&](int i) { return first + i < end ? from + (first + i) * p.keys.row : nullptr; });
      if (part == 0 && tid < S) {
        block.added[tid] = first + tid < end ? mask_at(p.mask, block.mask, first + tid) : -kInfinity;
      }
    }
    commit_copies();
  }

  // Values of slots [first, first + S): [S, columns], zeros where a slot is empty.
  MK_DEVICE void prefetch_values(int64_t first) {
    const SoftmaxRead& p = r.p;
    const char *values = block.values, *mask = block.mask;
    const int64_t end = block.end;
    copy_rows<W, kThreads>(int(threadIdx.x), S, block.columns, r.value_packs, values, buffers.next(), r.value_pitch,
                           [&](int i) {
                             const bool open = first + i < end && mask_at(p.mask, mask, first + i) != -kInfinity;
                             return open ? values + (first + i) * p.values.row : nullptr;
                           });
    commit_copies();
  }
};

// The ranges of a warp's tokens [16], if there are any. Found anew for each use: a pointer that lives through the loop
// takes two registers, which spill on sm_120 where three blocks share an SM.
struct RowRanges {
  int at;  // Tiling::ranges_at
  MK_DEVICE bool given() const { return at != 0; }
  MK_DEVICE bool holds(int row, int64_t slot) const {
    return ranges_at(at)[int(threadIdx.x) / 32 * 16 + row].holds(slot);
  }
};

// The scores s [16, S] of a warp's tokens and slots [first, first + S). Prefetches the values of these slots.
template <class M, class W, bool held, int S = kSlots<W>>
MK_DEVICE void score_tile(float (&s)[S / 8][4], const Queries<M, held>& queries, Loader<Stored<M>, W>& loader,
                          int64_t first, bool busy, RowRanges ranges) {
  const Tiling& r = loader.r;
  const int lane = int(threadIdx.x) % 32, size = int(sizeof(Stored<M>));
  Sums<M> sums[S / 8];
  for (int part = 0; part < (held ? 1 : r.key_parts); ++part) {
    const char* keys = loader.buffers.arrived();
    if (held || part + 1 == r.key_parts) loader.prefetch_values(first);
    else loader.prefetch_keys(first, part + 1);
    if (!busy) continue;
    const int bytes = int(least(kColumns, r.p.K - part * kColumns)) * size;
    queries.template multiply<S>(sums, r, keys, part * kColumns * size, bytes);
  }
#pragma unroll
  for (int n = 0; n < S / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = n * 8 + lane % 4 * 2 + i % 2;
      const float extra = loader.block.added[column];
      const bool open = extra != -kInfinity && (!ranges.given() || ranges.holds(lane / 4 + i / 2 * 8, first + column));
      s[n][i] = open ? score(float(r.p.scale), sums[n][i], extra) : -kInfinity;
    }
  }
}

// The online softmax of a lane's two tokens: the largest score m, and l = sum exp(s - m) over this lane's columns. Four
// neighbouring lanes share the two tokens.
struct Softmax {
  float m[2] = {-kInfinity, -kInfinity}, l[2] = {};

  // Updates m and l by the scores s [16, S] of a tile, which become p = exp(s - m) 2^lift. fade: exp(old m - m), the
  // factor of all earlier sums.
  template <int S, int lift>
  MK_DEVICE void weigh(float (&s)[S / 8][4], float (&fade)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float now = m[row];
#pragma unroll
      for (int n = 0; n < S / 8; ++n) now = fmaxf(now, fmaxf(s[n][2 * row], s[n][2 * row + 1]));
      now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, 1));
      now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, 2));
      const float base = isinf(now) ? 0.f : now;  // no open slot yet; a NaN or +inf shows in the sum
      fade[row] = m[row] == now ? 1.f : power_of_two((m[row] - base) * kLog2e);
      m[row] = now;
      float sum = 0;  // of this tile: a long sum is a sum of sums
#pragma unroll
      for (int n = 0; n < S / 8; ++n) {
#pragma unroll
        for (int i = 2 * row; i < 2 * row + 2; ++i) sum += s[n][i] = power_of_two((s[n][i] - base) * kLog2e + lift);
      }
      l[row] = l[row] * fade[row] + sum;
    }
  }

  // Sums l over the lanes of a token.
  MK_DEVICE void finish() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      l[row] += __shfl_xor_sync(kAllLanes, l[row], 1);
      l[row] += __shfl_xor_sync(kAllLanes, l[row], 2);
    }
  }
};

// acc = fade acc + p times a tile of values [S, columns], from slot `first` on.
template <class P, class W>
MK_DEVICE void add_values(float (&acc)[kColumns / 8][4], const float (&fade)[2], const Left<P> (&weights)[kSteps],
                          const char* values, int pitch, int columns, int64_t first, RowRanges ranges) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int c = 0; c < kColumns / 16; ++c) {
    if (c * 16 >= columns) break;
    Sums<P> sums[2];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t b[4];
      load_depth<W>(b, values + step * (kSlots<W> / kSteps) * pitch, pitch, c * 16, lane);
      add_product(sums[0], weights[step], b[0], b[1]);
      add_product(sums[1], weights[step], b[2], b[3]);
    }
    if constexpr (kRanged<P>) {
      auto inside = [&](int row, int j) { return ranges.holds(lane / 4 + row * 8, first + j); };
      if (ranges.given()) sum_inside<P>(sums, weights, values, pitch, c * 16, lane, inside);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& x = acc[2 * c + i / 4][i % 4];
      x = x * fade[i % 4 / 2] + sums[i / 4][i % 4];
    }
  }
}

// Stores the read [columns], lse and lse_rest of this lane's two tokens; if there are several ranges, their part of
// this range.
template <class X, int lift, int S>
MK_DEVICE void store_read(const Tiling& r, const Shared<S>& block, const float (&acc)[kColumns / 8][4],
                          const Softmax& softmax) {
  const SoftmaxRead& p = r.p;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, columns = block.columns;
  const int64_t tokens = p.lead.folded() * p.T, rows = r.ranges.rows, split = block.split, batch = block.batch;
  const int64_t column0 = block.column0;
  constexpr float kDrop = 1 / float(1 << lift);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float sum = softmax.l[row] * kDrop;
    const int64_t t = block.t0 + warp * 16 + row * 8 + lane / 4;
    if (t >= tokens) continue;
    const int64_t token = batch * tokens + t;
    float* part = r.ranges.partial == nullptr ? nullptr : r.ranges.partial + (split * rows + token) * p.V + column0;
    X* out = part != nullptr || columns <= 0
                 ? nullptr
                 : reinterpret_cast<X*>(token_row(p.read, p.lead, p.read.batch(p.lead, batch), p.T, t)) + column0;
    const float factor = part != nullptr ? kDrop : sum == 0 ? 0.f : kDrop / sum;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = n * 8 + lane % 4 * 2 + i;
        if (column >= columns) continue;
        const float x = acc[n][2 * row + i] * factor;
        if (part != nullptr) part[column] = x;
        else out[column] = from_float<X>(sum == 0 ? 0.f : x);
      }
    }
    if (column0 != 0 || lane % 4 != 0) continue;
    if (part != nullptr) {
      float* ends = r.ranges.partial + r.ranges.splits * rows * p.V;
      ends[split * rows + token] = softmax.m[row];
      ends[(r.ranges.splits + split) * rows + token] = sum;
    } else {
      store_lse(p, batch, t, softmax.m[row], sum);
    }
  }
}

// M: the arithmetic of the scores; `held`: queries stay in registers.
template <class M, class W, bool held>
MK_KERNEL_BLOCKS(kThreads, 3)
read_tiles(MK_PARAM(Tiling) r) {
  using X = Stored<M>;
  using P = Second<M, W>;
  constexpr int S = kSlots<W>;
  Shared<S>& block = *reinterpret_cast<Shared<S>*>(shared_memory());
  char* rows = shared_memory() + sizeof(Shared<S>);
  locate<W>(block, r);
  const RowRanges ranges{r.ranges_at};
  narrow(r.p, block, ranges_at(r.ranges_at), kTokens, S);
  const int64_t tokens = r.p.lead.folded() * r.p.T;
  const bool busy = block.t0 + int(threadIdx.x) / 32 * 16 < tokens;  // this warp has a token

  Queries<M, held> queries;
  queries.load(r, block, tokens, held ? rows : rows + kBuffers * r.buffer_bytes);
  Loader<X, W> loader{r, block, {rows, r.buffer_bytes}};
  const int64_t begin = block.begin;
  loader.prefetch_keys(begin, 0);

  Softmax softmax;
  float acc[kColumns / 8][4] = {};  // [16, columns] of a warp
  for (int64_t first = begin; first < block.end; first += S) {
    float s[S / 8][4], fade[2];
    score_tile<M, W, held>(s, queries, loader, first, busy, ranges);
    softmax.weigh<S, kLift<P>>(s, fade);
    Left<P> weights[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) weights[step] = weights_left<P>(s, step);

    const char* values = loader.buffers.arrived();
    loader.prefetch_keys(first + S, 0);
    if (busy) add_values<P, W>(acc, fade, weights, values, r.value_pitch, block.columns, first, ranges);
  }
  wait_copies<0>();

  softmax.finish();
  store_read<X, kLift<P>>(r, block, acc, softmax);
}

// The layout of a call, and the shared memory of its blocks.
struct Layout {
  Tiling r{};
  bool held = false;
  int64_t shared = 0;
};

template <class M, class W>
Layout lay_out(const SoftmaxRead& p) {
  using X = Stored<M>;
  Layout a;
  Tiling& r = a.r;
  r.p = p;
  r.value_blocks = int(most(1, div_up(p.V, kColumns)));
  r.width = int(round_up(div_up(p.V, r.value_blocks), 16));
  r.key_parts = int(most(1, div_up(p.K, kColumns)));
  r.query_pitch = tile_pitch<X>(p.K), r.key_pitch = tile_pitch<X>(least(p.K, kColumns));
  r.value_pitch = tile_pitch<W>(least(r.width, p.V));
  r.buffer_bytes = kSlots<W> * int(most(r.key_pitch, r.value_pitch));
  r.query_packs = in_packs(p.query, p.lead, p.K), r.key_packs = in_packs(p.keys, p.lead, p.K);
  r.value_packs = p.V > 0 && in_packs(p.values, p.lead, p.V);
  a.held = kMayHold<M, W> && r.key_parts == 1;
  const int64_t rows = kBuffers * int64_t(r.buffer_bytes), queries = int64_t(kTokens) * r.query_pitch;
  a.shared = int64_t(sizeof(Shared<kSlots<W>>)) + (a.held ? most(rows, queries) : rows + queries);
  r.ranges_at = place_ranges(p, a.shared);
  return a;
}

template <class M, class W, bool held>
void read(const Device& device, Layout& a) {
  Tiling& r = a.r;
  const SoftmaxRead& p = r.p;
  constexpr int64_t kLeastTiles = 4, kBlocksPerSm = 2;  // as for streams
  r.tiles = div_up(p.lead.folded() * p.T, kTokens);
  const int64_t units = p.lead.batches() * r.tiles * r.value_blocks;
  const int64_t wanted = div_up(device.sms * kBlocksPerSm, most(units, 1));
  const int64_t tiles = most(1, div_up(p.N, kSlots<W>));
  r.ranges.split_rows = div_up(tiles, most(1, least(wanted, tiles / kLeastTiles))) * kSlots<W>;
  r.ranges.splits = most(1, div_up(p.N, r.ranges.split_rows));
  r.ranges.rows = p.lead.batches() * p.lead.folded() * p.T;
  if (r.ranges.splits > 1) {
    r.ranges.partial = device.scratch<float>(r.ranges.splits * r.ranges.rows * (p.V + 2));
  }
  launch(device, "softmax_read", read_tiles<M, W, held>, units * r.ranges.splits, kThreads, a.shared, r);
  if (r.ranges.splits > 1) merge_ranges(device, p, r.ranges);
}

}  // namespace

bool tiles_take(const Device& device, const SoftmaxRead& p) {
  const bool types =
      p.query.dtype == p.keys.dtype && (p.V == 0 || p.values.dtype == p.keys.dtype || p.values.dtype == DType::f32);
  // Tiles are as wide as their rows: the number of bytes must fit an int.
  const bool exact = p.range && p.keys.dtype == DType::f32 && !device.allows_tf32(device.owner);
  return types && !exact && p.K <= 1 << 20 &&
         with_types(p, false, [&]<class M, class W>() { return lay_out<M, W>(p).shared; }) <= device.shared;
}

void softmax_read_tiles(const Device& device, const SoftmaxRead& p) {
  with_types(p, p.keys.dtype == DType::f32 && device.allows_tf32(device.owner), [&]<class M, class W>() {
    Layout a = lay_out<M, W>(p);
    if constexpr (kMayHold<M, W>) {
      if (a.held) return read<M, W, true>(device, a);
    }
    read<M, W, false>(device, a);
  });
}

}  // namespace mk::cuda
