// topk_search for many tokens: scores by products on the tensor cores.
//
// A block of four warps has 64 tokens, 16 per warp, and a range of slots in tiles of S. Key rows are loaded in parts of
// 256 bytes that alternate between two buffers: cp.async fills one while the other is multiplied. Queries stay in
// registers if they are 16-bit and one part wide, else in shared memory. Scores stay in registers unless they may be
// chosen.
//
// A warp keeps the lists of its tokens. Four lanes share two tokens and hold the k-th best score of each, the threshold
// that a score must exceed: slots come in order, so a later score that equals it ranks behind. Scores above it go into
// the token's queue, at positions from prefix sums over the four lanes. If a queue has no room for what a tile adds,
// the warp sorts and merges it first (bitonic), which raises the threshold, and looks at the tile again. A queue has
// room for a whole tile, so if scores ascend, the cost is one sort of the queue per tile.
//
// Ranges end as in topk_search.cu, which merges them.
#include "cuda/tiles/fragments.h"
#include "cuda/tiles/search_lists.h"

namespace mk::cuda {
namespace {

constexpr int kThreads = 128, kTokens = 64, kPartBytes = 256, kBuffers = 2;
constexpr int kSteps = kPartBytes / 32;  // depth steps of a product per part

struct Tiling {
  TopkSearch p;
  Lists lists;
  int queue;           // length of a queue, a power of two, at least S and the length of a list
  int64_t tiles;       // of tokens, per batch
  int64_t split_rows;  // slots per range, a multiple of S
  int key_parts;       // of a key row
  int query_pitch, key_pitch, buffer_bytes;
  bool query_packs, key_packs;
};

// S for an arithmetic: half as many for float32, whose sums take twice the registers.
template <class X>
constexpr int kSlots = 128 / int(sizeof(X));

// May queries stay in registers? Those of float32 are too large.
template <class M>
constexpr bool kMayHold = sizeof(Stored<M>) == 2;

// What a block keeps in shared memory beside rows and lists: its position in the call, the memory of its batch, and the
// mask's terms in the scores of two tiles: the current one and the one being copied.
template <int S>
struct alignas(16) Shared {
  int64_t t0, batch, split, end;  // the first token, of the batch; the range of slots; end: no slot from here on
  const char *keys, *mask;
  float added[2][S];
};

// The lists of a warp's 16 tokens in shared memory, each followed by its queue, and a lane's thresholds of its two
// tokens.
struct Best {
  Key* lists;
  int list, queue;
  int64_t k;
  float least[2];  // the k-th best score of each token
  int queued[2] = {};

  MK_DEVICE Key* of(int row) const { return lists + row * (list + queue); }

  // All lanes: merges the queue of token `row` into its list.
  MK_DEVICE void merge(int row) const {
    Key *best = of(row), *waiting = best + list;
    __syncwarp();
    sort_keys(waiting, queue);
    merge_keys(best, waiting, list);
    clear_keys(waiting, queue);
    __syncwarp();
  }

  // All lanes: offers the scores of slots [first, first + S), in the layout of a product.
  template <int S>
  MK_DEVICE void take(const float (&s)[S / 8][4], int64_t first, int lane) {
    unsigned found[2];  // bit 2 n + j: column j of product n
    int place[2], total[2];
    while (true) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        found[row] = 0;
#pragma unroll
        for (int i = 0; i < S / 4; ++i) found[row] |= unsigned(!(s[i / 2][2 * row + i % 2] <= least[row])) << i;
      }
      if (!__any_sync(kAllLanes, (found[0] | found[1]) != 0)) return;
      unsigned full = 0;  // bit 4 g + row: of the tokens of lanes 4 g to 4 g + 3
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int own = __popc(found[row]), other = __shfl_xor_sync(kAllLanes, own, 1);
        const int others = __shfl_xor_sync(kAllLanes, own + other, 2);
        place[row] = queued[row] + (lane & 1 ? other : 0) + (lane & 2 ? others : 0);
        total[row] = own + other + others;
        full |= __ballot_sync(kAllLanes, queued[row] + total[row] > queue) & 0x11111111u << row;
      }
      if (full == 0) break;
      for (unsigned rest = full; rest != 0; rest &= rest - 1) {
        const int bit = __ffs(int(rest)) - 1;
        merge(bit / 4 + bit % 4 * 8);
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if ((full >> (lane / 4 * 4 + row) & 1) == 0) continue;
        const Key last = of(lane / 4 + row * 8)[k - 1];
        least[row] = last == 0 ? -kInfinity : score_of(last);
        queued[row] = 0;
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      Key* waiting = of(lane / 4 + row * 8) + list;
#pragma unroll
      for (int i = 0; i < S / 4; ++i) {
        const int64_t slot = first + i / 2 * 8 + lane % 4 * 2 + i % 2;
        if (found[row] >> i & 1) waiting[place[row]++] = key_of(s[i / 2][2 * row + i % 2], slot);
      }
      queued[row] += total[row];
    }
  }
};

// M: the arithmetic of the scores; `held`: queries stay in registers.
template <class M, bool held>
MK_KERNEL_BLOCKS(kThreads, 3)
search_tiles(MK_PARAM(Tiling) r) {
  using X = Stored<M>;
  constexpr int S = kSlots<X>, kColumns = kPartBytes / int(sizeof(X));
  const TopkSearch& p = r.p;
  const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32, both = r.lists.length + r.queue;
  const int64_t tokens = p.lead.folded() * p.T;
  Shared<S>& block = *reinterpret_cast<Shared<S>*>(shared_memory());
  auto* lists = reinterpret_cast<Key*>(shared_memory() + sizeof(Shared<S>));
  char* buffers = reinterpret_cast<char*>(lists + kTokens * both);
  char* queries = held ? buffers : buffers + kBuffers * r.buffer_bytes;
  if (tid == 0) {
    int64_t at = blockIdx.x;
    block.t0 = at % r.tiles * kTokens;
    at /= r.tiles;
    block.split = at % r.lists.splits, block.batch = at / r.lists.splits;
    block.end = least(p.N, (block.split + 1) * r.split_rows);
    block.keys = p.keys.batch(p.lead, block.batch);
    block.mask = p.mask ? p.mask.batch(p.lead, block.batch) : nullptr;
  }
  __syncthreads();

  Best best{lists + warp * 16 * both, r.lists.length, r.queue, p.k, {}};
  clear_keys(best.lists, 16 * both);
#pragma unroll
  for (int row = 0; row < 2; ++row) {  // no score exceeds +inf, the threshold of tokens that do not exist
    best.least[row] = block.t0 + warp * 16 + row * 8 + lane / 4 < tokens ? -kInfinity : kInfinity;
  }
  __syncwarp();

  // Starts the copy of part `part` of the tile at row `first`; parts alternate between the buffers.
  int turn = 0;
  auto start_copy = [&](int64_t first, int part) {
    const int64_t end = block.end;
    if (first < end) {
      const char* from = block.keys + part * kPartBytes;
      copy_rows<X, kThreads>(tid, S, least(kColumns, p.K - part * kColumns), r.key_packs, from,
                             buffers + turn * r.buffer_bytes, r.key_pitch,
                             [&](int i) { return first + i < end ? from + (first + i) * p.keys.row : nullptr; });
      if (part == 0 && tid < S) {
        block.added[first / S % 2][tid] = first + tid < end ? mask_at(p.mask, block.mask, first + tid) : -kInfinity;
      }
    }
    commit_copies();
    turn ^= 1;
  };
  {
    const int64_t t0 = block.t0;
    char* base = p.query.batch(p.lead, block.batch);
    copy_rows<X, kThreads>(tid, kTokens, p.K, r.query_packs, base, queries, r.query_pitch, [&](int i) -> const char* {
      return t0 + i < tokens ? token_row(p.query, p.lead, base, p.T, t0 + i) : nullptr;
    });
  }
  const char* own_queries = queries + warp * 16 * r.query_pitch;
  Left<M> q[held ? kSteps : 1];
  if constexpr (held) {
    commit_copies();
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step * 32 < r.query_pitch - 16) load_left(q[step].x, own_queries, r.query_pitch, step * 32, lane);
    }
    __syncthreads();  // the buffers are free
  }

  const bool busy = block.t0 + warp * 16 < tokens;  // this warp has a token
  const int64_t begin = block.split * r.split_rows;
  start_copy(begin, 0);
  for (int64_t first = begin; first < block.end; first += S) {
    Sums<M> sums[S / 8];
    for (int part = 0; part < (held ? 1 : r.key_parts); ++part) {
      wait_copies<0>();
      __syncthreads();  // the part is visible to all threads, and the other buffer is free
      const char* buffer = buffers + (turn ^ 1) * r.buffer_bytes;
      const bool last = held || part + 1 == r.key_parts;
      start_copy(last ? first + S : first, last ? 0 : part + 1);
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
        for (int step = 0; step < kSteps; ++step) {
          if (step * 32 < bytes) multiply(q[step], step);
        }
      } else {
        for (int step = 0; step * 32 < bytes; ++step) {
          uint32_t x[4];
          load_left(x, own_queries, r.query_pitch, part * kPartBytes + step * 32, lane);
          multiply(left_of<M>(x), step);
        }
      }
    }
    if (!busy) continue;
    float s[S / 8][4];
#pragma unroll
    for (int n = 0; n < S / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float extra = block.added[first / S % 2][n * 8 + lane % 4 * 2 + i % 2];
        s[n][i] = extra == -kInfinity ? -kInfinity : score(float(p.scale), sums[n][i], extra);
      }
    }
    best.take<S>(s, first, lane);
  }
  wait_copies<0>();

  for (int row = 0; row < 16; ++row) {
    const int64_t t = block.t0 + warp * 16 + row;
    if (t >= tokens) break;
    if (__shfl_sync(kAllLanes, row < 8 ? best.queued[0] : best.queued[1], row % 8 * 4) > 0) best.merge(row);
    const Key* list = best.of(row);
    Key* out = r.lists.keys + (block.split * r.lists.rows + block.batch * tokens + t) * r.lists.length;
    for (int i = lane; i < r.lists.length; i += 32) out[i] = list[i];
  }
}

// The layout of a call, and the shared memory of its blocks.
struct Layout {
  Tiling r{};
  bool held = false;
  int64_t shared = 0;
};

template <class M>
Layout lay_out(const TopkSearch& p, int list) {
  using X = Stored<M>;
  constexpr int S = kSlots<X>, kColumns = kPartBytes / int(sizeof(X)), kQueue = 64;
  static_assert(kQueue >= S);
  Layout a;
  Tiling& r = a.r;
  r.p = p;
  r.queue = int(most(list, kQueue));
  r.tiles = div_up(p.lead.folded() * p.T, kTokens);
  r.key_parts = int(most(1, div_up(p.K, kColumns)));
  r.query_pitch = tile_pitch<X>(p.K), r.key_pitch = tile_pitch<X>(least(p.K, kColumns));
  r.buffer_bytes = S * r.key_pitch;
  r.query_packs = in_packs(p.query, p.lead, p.K), r.key_packs = in_packs(p.keys, p.lead, p.K);
  a.held = kMayHold<M> && r.key_parts == 1;
  const int64_t rows = kBuffers * int64_t(r.buffer_bytes), queries = int64_t(kTokens) * r.query_pitch;
  a.shared = int64_t(sizeof(Shared<S>)) + kTokens * (list + r.queue) * int64_t(sizeof(Key)) +
             (a.held ? most(rows, queries) : rows + queries);
  return a;
}

template <class M, bool held>
void run(const Device& device, const char* name, Layout& a, int list) {
  Tiling& r = a.r;
  const TopkSearch& p = r.p;
  constexpr int S = kSlots<Stored<M>>;
  constexpr int64_t kLeastTiles = 4, kBlocksPerSm = 2;  // as in stream_plan.h
  const int64_t units = p.lead.batches() * r.tiles, tiles = most(1, div_up(p.N, S));
  const int64_t wanted = div_up(device.sms * kBlocksPerSm, most(units, 1));
  r.split_rows = div_up(tiles, most(1, least(wanted, tiles / kLeastTiles))) * S;
  r.lists.length = list;
  r.lists.splits = most(1, div_up(p.N, r.split_rows));
  r.lists.rows = p.lead.batches() * p.lead.folded() * p.T;
  r.lists.keys = device.scratch<Key>(r.lists.splits * r.lists.rows * list);
  launch(device, name, search_tiles<M, held>, units * r.lists.splits, kThreads, a.shared, r);
}

// Calls body<M>() with the arithmetic of the scores.
template <class Body>
auto with_arithmetic(DType d, bool tf32_allowed, Body&& body) {
  switch (d) {
    case DType::f32: return tf32_allowed ? body.template operator()<tf32>() : body.template operator()<float>();
    case DType::bf16: return body.template operator()<bf16>();
    default: return body.template operator()<f16>();
  }
}

}  // namespace

bool tiles_take(const Device& device, const TopkSearch& p, int list) {
  // Tiles are as wide as their rows, so their number of bytes must fit an int.
  return p.query.dtype == p.keys.dtype && p.K <= 1 << 20 &&
         with_arithmetic(p.keys.dtype, false, [&]<class M>() { return lay_out<M>(p, list).shared; }) <= device.shared;
}

Lists search_in_tiles(const Device& device, const char* name, const TopkSearch& p, int list) {
  const bool tf32_allowed = p.keys.dtype == DType::f32 && device.allows_tf32(device.owner);
  return with_arithmetic(p.keys.dtype, tf32_allowed, [&]<class M>() {
    Layout a = lay_out<M>(p, list);
    if constexpr (kMayHold<M>) {
      if (a.held) {
        run<M, true>(device, name, a, list);
        return a.r.lists;
      }
    }
    run<M, false>(device, name, a, list);
    return a.r.lists;
  });
}

}  // namespace mk::cuda
