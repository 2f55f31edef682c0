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
// A block leaves out tiles of which none of its tokens may address a slot. Ranges end as in topk_search.cu, which
// merges them.
#include "cuda/tiles/search_tiles.h"

namespace mk::cuda {
namespace {

constexpr int kPartBytes = 256;  // of a key row

struct Tiling : SearchTiling {
  int key_parts;  // of a key row
};

// May queries stay in registers? Those of float32 are too large.
template <class M>
constexpr bool kMayHold = sizeof(Stored<M>) == 2;

// Loads key rows, part by part and tile by tile. Each part is prefetched one step ahead.
template <class X>
struct Loader {
  static constexpr int S = kSlots<X>, kColumns = kPartBytes / int(sizeof(X));
  const Tiling& r;
  SearchBlock<S>& block;
  Buffers buffers;

  // Starts the copy of part `part` of the tile at row `first`, [S, part], and with the first part stores the mask's
  // terms. Nothing past the range.
  MK_DEVICE void prefetch(int64_t first, int part) {
    const int tid = int(threadIdx.x);
    char* buffer = buffers.next();
    if (first < block.end) {
      const int column = part * kColumns;
      copy_keys<X>(r, block, first, S, column, least(kColumns, r.p.K - column), buffer);
      if (part == 0 && tid < S) block.added[first / S % 2][tid] = added_to(r, block, first + tid);
    }
    commit_copies();
  }

  // Waits for part `part` of the tile at row `first`, and prefetches the one after it.
  MK_DEVICE const char* arrived(int64_t first, int part, int parts) {
    const char* here = buffers.arrived();
    const bool last = part + 1 == parts;
    prefetch(last ? first + S : first, last ? 0 : part + 1);
    return here;
  }
};

// sums [16, S] = products of a warp's queries and keys [first, first + S).
template <class M, bool held, int S>
MK_DEVICE void multiply_tile(Sums<M> (&sums)[S / 8], const Queries<M, held>& queries, Loader<Stored<M>>& loader,
                             int64_t first, bool busy) {
  const Tiling& r = loader.r;
  const int parts = held ? 1 : r.key_parts;
  for (int part = 0; part < parts; ++part) {
    const char* keys = loader.arrived(first, part, parts);
    if (!busy) continue;
    const int bytes = int(least(loader.kColumns, r.p.K - part * loader.kColumns)) * int(sizeof(Stored<M>));
    queries.template multiply<S>(sums, r, keys, part * kPartBytes, bytes);
  }
}

// The scores s [16, S] of a warp's tokens and slots [first, first + S), from products of queries and keys. ranges: of
// these tokens [16], or null.
template <class M, int S>
MK_DEVICE void to_scores(float (&s)[S / 8][4], const Sums<M> (&sums)[S / 8], const SearchBlock<S>& block, float scale,
                         int64_t first, int lane, const SlotRange* ranges) {
#pragma unroll
  for (int n = 0; n < S / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = n * 8 + lane % 4 * 2 + i % 2;
      const float extra = block.added[first / S % 2][column];
      const bool open =
          extra != -kInfinity && (ranges == nullptr || ranges[lane / 4 + i / 2 * 8].holds(first + column));
      s[n][i] = open ? score(scale, sums[n][i], extra) : -kInfinity;
    }
  }
}

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
  MK_DEVICE void merge(int row) const { KeptList{of(row), list, queue, k}.merge(); }

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

// Stores the lists of a warp's 16 tokens, from token t0 of the batch on: [16, list].
template <int S>
MK_DEVICE void store_lists(const Best& best, const Tiling& r, const SearchBlock<S>& block, int64_t t0, int64_t tokens,
                           int lane) {
  for (int row = 0; row < 16; ++row) {
    const int64_t t = t0 + row;
    if (t >= tokens) break;
    if (__shfl_sync(kAllLanes, row < 8 ? best.queued[0] : best.queued[1], row % 8 * 4) > 0) best.merge(row);
    const Key* list = best.of(row);
    Key* out = r.lists.keys + (block.split * r.lists.rows + block.batch * tokens + t) * r.lists.length;
    for (int i = lane; i < r.lists.length; i += 32) out[i] = list[i];
  }
}

// M: the arithmetic of the scores; `held`: queries stay in registers.
template <class M, bool held>
MK_KERNEL_BLOCKS(kThreads, 3)
search_tiles(MK_PARAM(Tiling) r) {
  using X = Stored<M>;
  constexpr int S = kSlots<X>;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, both = r.lists.length + r.queue;
  const int64_t tokens = r.p.lead.folded() * r.p.T;
  SearchBlock<S>& block = *reinterpret_cast<SearchBlock<S>*>(shared_memory());
  auto* lists = reinterpret_cast<Key*>(shared_memory() + sizeof(SearchBlock<S>));
  char* buffers = reinterpret_cast<char*>(lists + kTokens * both);
  locate(block, r);
  const SlotRange* ranges = ranges_at(r.ranges_at);
  narrow(r.p, block, ranges_at(r.ranges_at), kTokens, S);

  Best best{lists + warp * 16 * both, r.lists.length, r.queue, r.p.k, {}};
  clear_keys(best.lists, 16 * both);
#pragma unroll
  for (int row = 0; row < 2; ++row) {  // no score exceeds +inf, the threshold of tokens that do not exist
    best.least[row] = block.t0 + warp * 16 + row * 8 + lane / 4 < tokens ? -kInfinity : kInfinity;
  }
  __syncwarp();
  Queries<M, held> queries;
  queries.load(r, block, tokens, held ? buffers : buffers + kBuffers * r.buffer_bytes);
  Loader<X> loader{r, block, {buffers, r.buffer_bytes}};
  if (ranges != nullptr) ranges += warp * 16;
  const int64_t begin = block.begin;
  loader.prefetch(begin, 0);

  const bool busy = block.t0 + warp * 16 < tokens;  // this warp has a token
  for (int64_t first = begin; first < block.end; first += S) {
    Sums<M> sums[S / 8];
    multiply_tile<M, held, S>(sums, queries, loader, first, busy);
    if (!busy) continue;
    float s[S / 8][4];
    to_scores<M, S>(s, sums, block, float(r.p.scale), first, lane, ranges);
    best.take<S>(s, first, lane);
  }
  wait_copies<0>();
  store_lists(best, r, block, block.t0 + warp * 16, tokens, lane);
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
  r.tokens = kTokens;
  r.tiles = div_up(p.lead.folded() * p.T, kTokens);
  r.key_parts = int(most(1, div_up(p.K, kColumns)));
  r.query_pitch = tile_pitch<X>(p.K), r.key_pitch = tile_pitch<X>(least(p.K, kColumns));
  r.buffer_bytes = S * r.key_pitch;
  r.query_packs = in_packs(p.query, p.lead, p.K), r.key_packs = in_packs(p.keys, p.lead, p.K);
  a.held = kMayHold<M> && r.key_parts == 1;
  const int64_t rows = kBuffers * int64_t(r.buffer_bytes), queries = int64_t(kTokens) * r.query_pitch;
  a.shared = int64_t(sizeof(SearchBlock<S>)) + kTokens * (list + r.queue) * int64_t(sizeof(Key)) +
             (a.held ? most(rows, queries) : rows + queries);
  r.ranges_at = place_ranges(p, a.shared);
  return a;
}

template <class M, bool held>
void run(const Device& device, const char* name, Layout& a, int list) {
  Tiling& r = a.r;
  const TopkSearch& p = r.p;
  cut_slots(device, r, kSlots<Stored<M>>);
  r.lists.length = list;
  r.lists.splits = r.splits;
  r.lists.rows = p.lead.batches() * p.lead.folded() * p.T;
  r.lists.keys = device.scratch<Key>(r.lists.splits * r.lists.rows * list);
  launch(device, name, search_tiles<M, held>, p.lead.batches() * r.tiles * r.splits, kThreads, a.shared, r);
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
