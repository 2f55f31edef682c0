// softmax_read for many tokens: products of tiles on the tensor cores.
//
// A block of four warps has 64 tokens, 16 to a warp, up to 128 value columns and a range of slots in tiles of S. Rows of keys (in
// parts of 128 columns) and of values take turns in two buffers: one is on its way by cp.async while the other is multiplied. Scores
// stay in registers, where they become p = exp(s - m) and the left side of the second product. Queries stay in registers too where
// they are 16-bit and one part wide, otherwise in shared memory.
//
// Scores are natural, not in base 2: what is far from 0 would lose digits that lse needs. Sums l are taken before p is rounded to 16
// bits, because lse is float32 whatever the dtype; the roundings of p average out in the read. For float16 p is 2^15 times as
// large: with 1 at most it would lose all that is below 2^-25.
//
// Ranges end as in softmax_read.cu, and are merged there.
#include "cuda/fragments.h"
#include "cuda/softmax_read.h"

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
template <class X, class W>
using Arithmetic = std::conditional_t<std::is_same_v<X, W>, X, tf32>;
// S: a tile of values has 128 bytes times kColumns.
template <class W>
constexpr int kSlots = 128 / int(sizeof(W));

// `held`: queries lie in registers.
template <class X, class W, bool held>
MK_KERNEL(kThreads)
read_tiles(MK_PARAM(Tiling) r) {
  using M = Arithmetic<X, W>;
  constexpr int S = kSlots<W>;
  constexpr float kLift = std::is_same_v<M, f16> ? 15 : 0;
  const SoftmaxRead& p = r.p;
  const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32;
  int64_t at = blockIdx.x;
  const int64_t t0 = at % r.tiles * kTokens;
  at /= r.tiles;
  const int value_block = int(at % r.value_blocks);
  at /= r.value_blocks;
  const int64_t split = at % r.ranges.splits, batch = at / r.ranges.splits, tokens = p.lead.folded() * p.T;
  const int64_t begin = split * r.ranges.split_rows, end = least(p.N, begin + r.ranges.split_rows);
  const int64_t column0 = int64_t(value_block) * r.width;
  const int columns = int(least(r.width, p.V - column0));
  const bool busy = t0 + warp * 16 < tokens;  // this warp has a token

  auto* added = reinterpret_cast<float*>(shared_memory());  // what the mask adds: [2][S], of this tile and the next
  char* buffers = reinterpret_cast<char*>(added + 2 * S);
  char* queries = held ? buffers : buffers + kBuffers * r.buffer_bytes;
  const char* keys = p.keys.batch(p.lead, batch);
  const char* values = columns > 0 ? p.values.batch(p.lead, batch) + column0 * int64_t(sizeof(W)) : nullptr;
  const char* mask = p.mask ? p.mask.batch(p.lead, batch) : nullptr;

  // Rows are asked for in the order in which they are used: the key parts of a tile, then its values.
  int64_t asked = begin;
  int asked_part = 0, asked_buffer = 0, asked_tile = 0;
  auto ask = [&] {
    if (asked < end) {
      char* buffer = buffers + asked_buffer * r.buffer_bytes;
      if (asked_part < r.key_parts) {
        const char* from = keys + asked_part * kColumns * int64_t(sizeof(X));
        copy_rows<X, kThreads>(S, least(kColumns, p.K - asked_part * kColumns), r.key_packs, keys, buffer, r.key_pitch,
                               [&](int i) { return asked + i < end ? from + (asked + i) * p.keys.row : nullptr; });
        if (asked_part == 0 && tid < S) {
          added[asked_tile * S + tid] = asked + tid < end ? mask_at(p.mask, mask, asked + tid) : -kInfinity;
        }
      } else {
        copy_rows<W, kThreads>(S, columns, r.value_packs, values, buffer, r.value_pitch, [&](int i) {
          const bool open = asked + i < end && mask_at(p.mask, mask, asked + i) != -kInfinity;
          return open ? values + (asked + i) * p.values.row : nullptr;
        });
      }
    }
    commit_copies();
    asked_buffer ^= 1;
    if (++asked_part == r.key_parts + (columns > 0 ? 1 : 0)) asked_part = 0, asked += S, asked_tile ^= 1;
  };
  // Waits for the rows that were asked for last, asks for the next, and says where they are.
  int buffer_index = 0;
  auto next_rows = [&]() -> const char* {
    wait_copies<0>();
    __syncthreads();  // they are there for all threads, and the other buffer is free
    ask();
    const char* buffer = buffers + buffer_index * r.buffer_bytes;
    buffer_index ^= 1;
    return buffer;
  };

  char* query_base = p.query.batch(p.lead, batch);
  copy_rows<X, kThreads>(kTokens, p.K, r.query_packs, query_base, queries, r.query_pitch, [&](int i) -> const char* {
    return t0 + i < tokens ? token_row(p.query, p.lead, query_base, p.T, t0 + i) : nullptr;
  });
  const char* own_queries = queries + warp * 16 * r.query_pitch;
  Left<X> q[held ? kColumns * int(sizeof(X)) / 32 : 1];
  if constexpr (held) {
    commit_copies();
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kColumns * int(sizeof(X)) / 32; ++step) {
      if (step * 32 < r.query_pitch - 16) load_left(q[step].x, own_queries, r.query_pitch, step * 32);
    }
    __syncthreads();  // the buffers are free
  }
  ask();

  float m[2] = {-kInfinity, -kInfinity}, l[2] = {}, acc[kColumns / 8][4] = {};
  int tile = 0;
  for (int64_t first = begin; first < end; first += S, tile ^= 1) {
    float s[S / 8][4];
    {
      Sums<X> sums[S / 8];
      for (int part = 0; part < r.key_parts; ++part) {
        const char* buffer = next_rows();
        if (!busy) continue;
        auto multiply = [&](const Left<X>& a, int step) {
#pragma unroll
          for (int j = 0; j < S / 16; ++j) {
            uint32_t b[4];
            load_columns(b, buffer + j * 16 * r.key_pitch, r.key_pitch, step * 32);
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
            load_left(x, own_queries, r.query_pitch, part * kColumns * int(sizeof(X)) + step * 32);
            multiply(left_of<X>(x), step);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < S / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float extra = added[tile * S + n * 8 + lane % 4 * 2 + i % 2];
          s[n][i] = extra == -kInfinity ? -kInfinity : float(p.scale) * sums[n][i] + extra;
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
      l[row] *= fade[row];
      m[row] = now;
#pragma unroll
      for (int n = 0; n < S / 8; ++n) {
#pragma unroll
        for (int i = 2 * row; i < 2 * row + 2; ++i) {
          l[row] += s[n][i] = power_of_two((s[n][i] - base) * kLog2e + kLift);
        }
      }
    }
    if (columns <= 0) continue;
    Left<M> weights[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) weights[step] = weights_left<M>(s, step);

    const char* buffer = next_rows();
    if (!busy) continue;
#pragma unroll
    for (int c = 0; c < kColumns / 16; ++c) {
      if (c * 16 >= columns) break;
      Sums<M> sums[2];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t b[4];
        load_depth<W>(b, buffer + step * (S / kSteps) * r.value_pitch, r.value_pitch, c * 16);
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

  constexpr float kDrop = 1 / float(1 << int(kLift));
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float sum = l[row] * kDrop;
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    const int64_t t = t0 + warp * 16 + row * 8 + lane / 4;
    if (t >= tokens) continue;
    const int64_t token = batch * tokens + t, rows = r.ranges.rows;
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
    if (value_block != 0 || lane % 4 != 0) continue;
    if (part != nullptr) {
      float* ends = r.ranges.partial + r.ranges.splits * rows * p.V;
      ends[split * rows + token] = m[row];
      ends[(r.ranges.splits + split) * rows + token] = sum;
    } else {
      store(token_row(p.lse, p.lead, p.lse.batch(p.lead, batch), p.T, t), DType::f32, 0,
            sum == 0 ? -kInfinity : (isinf(m[row]) ? 0.f : m[row]) + logf(sum));
    }
  }
}

// The layout of a call, and the shared memory of its blocks.
struct Layout {
  Tiling r{};
  bool held = false;
  int64_t shared = 0;
};

template <class X, class W>
Layout lay_out(const SoftmaxRead& p) {
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
  a.held = sizeof(X) == 2 && r.key_parts == 1;
  const int64_t rows = kBuffers * int64_t(r.buffer_bytes), queries = int64_t(kTokens) * r.query_pitch;
  a.shared = 2 * kSlots<W> * 4 + (a.held ? most(rows, queries) : rows + queries);
  return a;
}

template <class X, class W, bool held>
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
  launch(device, "softmax_read", read_tiles<X, W, held>, units * r.ranges.splits, kThreads, a.shared, r);
  if (r.ranges.splits > 1) merge_ranges(device, p, r.ranges);
}

// Calls body<X, W>() for the types of keys and values.
template <class Body>
auto with_types(const SoftmaxRead& p, Body&& body) {
  const bool same = p.V == 0 || p.values.dtype == p.keys.dtype;
  switch (p.keys.dtype) {
    case DType::f32: return body.template operator()<float, float>();
    case DType::bf16: return same ? body.template operator()<bf16, bf16>() : body.template operator()<bf16, float>();
    default: return same ? body.template operator()<f16, f16>() : body.template operator()<f16, float>();
  }
}

}  // namespace

bool tiles_take(const Device& device, const SoftmaxRead& p) {
  const bool types =
      p.query.dtype == p.keys.dtype && (p.V == 0 || p.values.dtype == p.keys.dtype || p.values.dtype == DType::f32);
  // Tiles are as wide as their rows: the number of bytes must fit an int.
  return types && p.K <= 1 << 20 &&
         with_types(p, [&]<class X, class W>() { return lay_out<X, W>(p).shared; }) <= device.shared;
}

void softmax_read_tiles(const Device& device, const SoftmaxRead& p) {
  with_types(p, [&]<class X, class W>() {
    Layout a = lay_out<X, W>(p);
    if constexpr (sizeof(X) == 2) {
      if (a.held) return read<X, W, true>(device, a);
    }
    read<X, W, false>(device, a);
  });
}

}  // namespace mk::cuda
