// softmax_read for many tokens: products of tiles on the tensor cores.
//
// A block of four warps has 64 tokens, 16 to a warp, up to 128 value columns and a range of slots in tiles of S. Rows of keys (in
// parts of 128 columns) and of values take turns in two buffers: one is on its way by cp.async while the other is multiplied. Scores
// stay in registers, where they become p = exp(s - m) and the left side of the second product. Queries stay in registers too where
// they and the values are 16-bit and they are one part wide, otherwise in shared memory.
//
// Scores are natural, not in base 2: what is far from 0 would lose digits that lse needs. Sums l are taken before p is rounded to 16
// bits, because lse is float32 whatever the dtype; the roundings of p average out in the read. For float16 p is 2^15 times as
// large: with 1 at most it would lose all that is below 2^-25.
//
// Ranges end as in softmax_read.cu, and are merged there.
#include "cuda/tiles/fragments.h"
#include "cuda/tiles/read_ranges.h"

namespace mk::cuda {
namespace {

constexpr int kThreads = 128, kTokens = 64, kColumns = 128, kBuffers = 2;
constexpr int kSteps = 4;  // of the depth of the second product

struct Tiling {
  SoftmaxRead p;
  Ranges ranges;
  int64_t tiles;  // of tokens, per batch
  int value_blocks;
  int width;      // value columns of a block but the last
  int key_parts;  // of a key row
  int query_pitch, key_pitch, value_pitch, buffer_bytes;
  bool query_packs, key_packs, value_packs;
};

// How p and values are multiplied.
template <class M, class W>
using Second = std::conditional_t<std::is_same_v<Stored<M>, W>, M, tf32>;
// S: a tile of values has 128 bytes times kColumns.
template <class W>
constexpr int kSlots = 128 / int(sizeof(W));

// Whether queries may lie in registers: of float32 there are too many, and beside float32 values it is not worth one more kernel.
template <class M, class W>
constexpr bool kMayHold = sizeof(Stored<M>) == 2 && sizeof(W) == 2;

// What a block keeps in shared memory beside rows, because registers are short: where it is in the call, where the memory of its batch
// is, and what the mask adds to the scores of the tile.
template <int S>
struct alignas(16) Shared {
  int64_t t0, batch, split, column0;  // the first token, of the batch; the range of slots; the first value column
  int64_t end;                        // no slot from here on
  int columns;                        // of values
  const char *keys, *values, *mask;
  float added[S];
};

// M: the arithmetic of the scores; `held`: queries lie in registers.
template <class M, class W, bool held>
MK_KERNEL_BLOCKS(kThreads, 3)
read_tiles(MK_PARAM(Tiling) r) {
  using X = Stored<M>;
  using P = Second<M, W>;
  constexpr int S = kSlots<W>;
  constexpr float kLift = std::is_same_v<P, f16> ? 15 : 0;
  const SoftmaxRead& p = r.p;
  const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32;
  Shared<S>& block = *reinterpret_cast<Shared<S>*>(shared_memory());
  char* buffers = shared_memory() + sizeof(Shared<S>);
  char* queries = held ? buffers : buffers + kBuffers * r.buffer_bytes;
  if (tid == 0) {
    int64_t at = blockIdx.x;
    block.t0 = at % r.tiles * kTokens;
    at /= r.tiles;
    block.column0 = at % r.value_blocks * r.width;
    at /= r.value_blocks;
    block.split = at % r.ranges.splits, block.batch = at / r.ranges.splits;
    block.end = least(p.N, (block.split + 1) * r.ranges.split_rows);
    block.columns = int(least(r.width, p.V - block.column0));
    block.keys = p.keys.batch(p.lead, block.batch);
    block.values = p.V > 0 ? p.values.batch(p.lead, block.batch) + block.column0 * int64_t(sizeof(W)) : nullptr;
    block.mask = p.mask ? p.mask.batch(p.lead, block.batch) : nullptr;
  }
  __syncthreads();
  const bool busy = block.t0 + warp * 16 < p.lead.folded() * p.T;  // this warp has a token

  // Rows take turns in the buffers: the key parts of a tile, then its values. Each is asked for one step ahead.
  int turn = 0;
  auto ask_keys = [&](int64_t first, int part) {
    const int64_t end = block.end;
    if (first < end) {
      const char* from = block.keys + part * kColumns * int64_t(sizeof(X));
      copy_rows<X, kThreads>(tid, S, least(kColumns, p.K - part * kColumns), r.key_packs, from,
                             buffers + turn * r.buffer_bytes, r.key_pitch,
                             [&](int i) { return first + i < end ? from + (first + i) * p.keys.row : nullptr; });
      if (part == 0 && tid < S) {
        block.added[tid] = first + tid < end ? mask_at(p.mask, block.mask, first + tid) : -kInfinity;
      }
    }
    commit_copies();
    turn ^= 1;
  };
  auto ask_values = [&](int64_t first) {
    const char *values = block.values, *mask = block.mask;
    const int64_t end = block.end;
    copy_rows<W, kThreads>(tid, S, block.columns, r.value_packs, values, buffers + turn * r.buffer_bytes, r.value_pitch,
                           [&](int i) {
                             const bool open = first + i < end && mask_at(p.mask, mask, first + i) != -kInfinity;
                             return open ? values + (first + i) * p.values.row : nullptr;
                           });
    commit_copies();
    turn ^= 1;
  };
  // Waits for the rows asked for last; their buffer. The other one is free for the next to ask.
  auto arrived = [&]() -> const char* {
    wait_copies<0>();
    __syncthreads();
    return buffers + (turn ^ 1) * r.buffer_bytes;
  };

  {
    const int64_t t0 = block.t0, tokens = p.lead.folded() * p.T;
    char* base = p.query.batch(p.lead, block.batch);
    copy_rows<X, kThreads>(tid, kTokens, p.K, r.query_packs, base, queries, r.query_pitch, [&](int i) -> const char* {
      return t0 + i < tokens ? token_row(p.query, p.lead, base, p.T, t0 + i) : nullptr;
    });
  }
  const char* own_queries = queries + warp * 16 * r.query_pitch;
  Left<M> q[held ? kColumns * int(sizeof(X)) / 32 : 1];
  if constexpr (held) {
    commit_copies();
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kColumns * int(sizeof(X)) / 32; ++step) {
      if (step * 32 < r.query_pitch - 16) load_left(q[step].x, own_queries, r.query_pitch, step * 32, lane);
    }
    __syncthreads();  // the buffers are free
  }
  const int64_t begin = block.split * r.ranges.split_rows;
  ask_keys(begin, 0);

  float m[2] = {-kInfinity, -kInfinity}, l[2] = {}, acc[kColumns / 8][4] = {};
  for (int64_t first = begin; first < block.end; first += S) {
    float s[S / 8][4];
    {
      Sums<M> sums[S / 8];
      for (int part = 0; part < (held ? 1 : r.key_parts); ++part) {
        const char* buffer = arrived();
        if (held || part + 1 == r.key_parts) ask_values(first);
        else ask_keys(first, part + 1);
        if (!busy) continue;
        auto multiply = [&](const Left<M>& a, int step) {
#pragma unroll
          for (int j = 0; j < S / 16; ++j) {
            uint32_t b[4];
            load_columns(b, buffer + j * 16 * r.key_pitch, r.key_pitch, step * 32, lane);
            add_product(sums[2 * j], a, b[0], b[1]);
            add_product(sums[2 * j + 1], a, b[2], b[3]);
          }
        };
        const int bytes = int(least(kColumns, p.K - part * kColumns)) * int(sizeof(X));
        if constexpr (held) {
#pragma unroll
          for (int step = 0; step < kColumns * int(sizeof(X)) / 32; ++step) {
            if (step * 32 < bytes) multiply(q[step], step);
          }
        } else {
          for (int step = 0; step * 32 < bytes; ++step) {
            uint32_t x[4];
            load_left(x, own_queries, r.query_pitch, part * kColumns * int(sizeof(X)) + step * 32, lane);
            multiply(left_of<M>(x), step);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < S / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float extra = block.added[n * 8 + lane % 4 * 2 + i % 2];
          s[n][i] = extra == -kInfinity ? -kInfinity : score(float(p.scale), sums[n][i], extra);
        }
      }
    }

    // Four neighbouring lanes share two tokens.
    float fade[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float now = m[row];
#pragma unroll
      for (int n = 0; n < S / 8; ++n) now = fmaxf(now, fmaxf(s[n][2 * row], s[n][2 * row + 1]));
      now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, 1));
      now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, 2));
      const float base = isinf(now) ? 0.f : now;  // nothing addressable yet; a NaN or +inf shows in the sum
      fade[row] = m[row] == now ? 1.f : power_of_two((m[row] - base) * kLog2e);
      m[row] = now;
      float sum = 0;  // of this tile: a long sum is one of sums
#pragma unroll
      for (int n = 0; n < S / 8; ++n) {
#pragma unroll
        for (int i = 2 * row; i < 2 * row + 2; ++i) {
          sum += s[n][i] = power_of_two((s[n][i] - base) * kLog2e + kLift);
        }
      }
      l[row] = l[row] * fade[row] + sum;
    }
    Left<P> weights[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) weights[step] = weights_left<P>(s, step);

    const char* buffer = arrived();
    ask_keys(first + S, 0);
    if (!busy) continue;
    const int columns = block.columns;
#pragma unroll
    for (int c = 0; c < kColumns / 16; ++c) {
      if (c * 16 >= columns) break;
      Sums<P> sums[2];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t b[4];
        load_depth<W>(b, buffer + step * (S / kSteps) * r.value_pitch, r.value_pitch, c * 16, lane);
        add_product(sums[0], weights[step], b[0], b[1]);
        add_product(sums[1], weights[step], b[2], b[3]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& x = acc[2 * c + i / 4][i % 4];
        x = x * fade[i % 4 / 2] + sums[i / 4][i % 4];
      }
    }
  }
  wait_copies<0>();

  const int64_t tokens = p.lead.folded() * p.T, rows = r.ranges.rows, split = block.split, batch = block.batch;
  const int64_t column0 = block.column0;
  const int columns = block.columns;
  constexpr float kDrop = 1 / float(1 << int(kLift));
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    l[row] += __shfl_xor_sync(kAllLanes, l[row], 1);
    l[row] += __shfl_xor_sync(kAllLanes, l[row], 2);
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float sum = l[row] * kDrop;
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
      ends[split * rows + token] = m[row];
      ends[(r.ranges.splits + split) * rows + token] = sum;
    } else {
      store_lse(p, batch, t, m[row], sum);
    }
  }
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
  return a;
}

template <class M, class W, bool held>
void read(const Device& device, Layout& a) {
  Tiling& r = a.r;
  const SoftmaxRead& p = r.p;
  constexpr int64_t kLeastTiles = 4, kBlocksPerProcessor = 2;  // as for streams
  r.tiles = div_up(p.lead.folded() * p.T, kTokens);
  const int64_t units = p.lead.batches() * r.tiles * r.value_blocks;
  const int64_t wanted = div_up(device.processors * kBlocksPerProcessor, most(units, 1));
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
  return types && p.K <= 1 << 20 &&
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
