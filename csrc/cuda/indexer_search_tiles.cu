// indexer_search in tiles: products of all heads on the tensor cores.
//
// A row of a product is a head of a token, so that few tokens fill the matrices, too. Each token has P rows: H rounded
// up to a power of two, or beyond 16 to whole products of 16 rows. A warp has 16 / P tokens, or one whose heads are
// several products. A block of four warps has up to four such groups of tokens; where tokens are fewer, its warps share
// them and take different slots of a tile. Queries, head weights and lists stay in shared memory. Keys arrive in tiles
// of S slots for each warp that shares tokens, whole rows, in two buffers: cp.async fills one while the other is
// multiplied. A tile is loaded once for all heads.
//
// relu and head weights follow in registers, where the products of a token are added up. Then lanes add their rows:
// each step of the sum halves the slots that a lane is concerned with, so that 32 numbers take 28 shuffles. The scores
// of a token lie side by side in shared memory after that, and those above its k-th best go into its queue (cuda/tiles/
// best.h). All sums have one fixed order.
//
// A block leaves out tiles of which none of its tokens may address a slot. Every warp that shares tokens leaves lists
// of its own; topk_search.cu merges all of them.
#include "cuda/tiles/head_signs.h"
#include "cuda/tiles/search_tiles.h"

namespace mk::cuda {
namespace {

constexpr int kWarps = kThreads / 32;

struct Tiling : SearchTiling {
  Heads heads;
  int groups, sharing;  // groups of tokens; warps that share one
  int per_group;        // tokens of a group
  int rows;             // of a token: P
  int products;         // of 16 rows, of a group
  // Bytes from the begin of shared memory.
  int scores_at, weights_at, queries_at, keys_at;
};

// The part of a block that a warp has.
struct Part {
  int group, which;  // which of the warps that share the group
  MK_DEVICE explicit Part(const Tiling& r)
      : group(int(threadIdx.x) / 32 % r.groups), which(int(threadIdx.x) / 32 / r.groups) {}
};

// All threads: starts the copy of the queries of a block [groups, 16 products, K], and stores their head weights.
template <class X, int S>
MK_DEVICE void load_heads(const Tiling& r, const SearchBlock<S>& block, int64_t tokens) {
  const TopkSearch& p = r.p;
  const int rows = r.groups * r.products * 16;
  char* base = p.query.batch(p.lead, block.batch);
  copy_rows<X, kThreads>(int(threadIdx.x), rows, p.K, r.query_packs, base, shared_memory() + r.queries_at,
                         r.query_pitch, [&](int i) -> const char* {
                           const int64_t t = block.t0 + i / r.rows;
                           const bool there = t < tokens && i % r.rows < r.heads.H;
                           return there ? token_row(p.query, p.lead, base, p.T, t) + i % r.rows * r.heads.stride
                                        : nullptr;
                         });
  auto* weights = reinterpret_cast<float*>(shared_memory() + r.weights_at);
  char* from = r.heads.weights.batch(p.lead, block.batch);
  for (int i = int(threadIdx.x); i < rows; i += kThreads) {
    const int64_t t = block.t0 + i / r.rows;
    const bool there = t < tokens && i % r.rows < r.heads.H;
    weights[i] =
        there ? load(token_row(r.heads.weights, p.lead, from, p.T, t), r.heads.weights.dtype, i % r.rows) : 0.f;
  }
}

// total [row / 8][slot] += weights times relu(scale times the products of 16 rows), for this lane's two rows. What rows
// beyond the heads hold is left out.
template <class M, int S>
MK_DEVICE void add_heads(float (&total)[2][S / 4], const Sums<M> (&sums)[S / 8], const float* weights, float scale,
                         int first, const Tiling& r, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first + lane / 4 + i * 8;
    const float w = weights[row];
    const bool there = row % r.rows < r.heads.H;
#pragma unroll
    for (int n = 0; n < S / 4; ++n) {
      const float x = w * relu(scale * sums[n / 2][2 * i + n % 2]);
      total[i][n] += there ? x : 0.f;
    }
  }
}

// One step of a sum over lanes that are `distance` apart: each keeps the sums of one half of the n numbers, the upper
// one if its bit `distance` is set.
template <int n, int all>
MK_DEVICE void halve(float (&x)[all], int distance, int lane, int& begin) {
  const bool upper = (lane & distance) != 0;
#pragma unroll
  for (int i = 0; i < n / 2; ++i) {
    const float kept = upper ? x[i + n / 2] : x[i], given = upper ? x[i] : x[i + n / 2];
    x[i] = kept + __shfl_xor_sync(kAllLanes, given, distance);
  }
  if (upper) begin += n / 2;
}

// Adds up the rows of each token of a warp, and stores the sums as scores [token][S].
template <int S>
MK_DEVICE void add_rows(float (&total)[2][S / 4], int rows, float* scores, int lane) {
  constexpr int n = S / 4;
  if (rows >= 16) {
#pragma unroll
    for (int i = 0; i < n; ++i) total[0][i] += total[1][i];
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half == 1 && rows >= 16) break;
    float(&x)[n] = total[half];
    int begin = 0, count = n;
    if (rows > 1) halve<n>(x, 4, lane, begin), count = n / 2;
    if (rows > 2) halve<n / 2>(x, 8, lane, begin), count = n / 4;
    if (rows > 4) halve<n / 4>(x, 16, lane, begin), count = n / 8;
    float* to = scores + (lane / 4 + half * 8) / rows * S + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (i < count) to[(begin + i) / 2 * 8 + (begin + i) % 2] = x[i];
    }
  }
}

// The slots of a tile of all warps that share tokens.
template <class X>
constexpr int kTile = kWarps * kSlots<X>;

// Starts the copy of the tile at slot `first`, and stores the mask's terms.
template <class X>
MK_DEVICE void prefetch(const Tiling& r, SearchBlock<kTile<X>>& block, Buffers& buffers, int turn, int64_t first) {
  const int slots = r.sharing * kSlots<X>;
  char* buffer = buffers.next();
  if (first < block.end) {
    copy_keys<X>(r, block, first, slots, 0, r.p.K, buffer);
    for (int i = int(threadIdx.x); i < slots; i += kThreads) block.added[turn][i] = added_to(r, block, first + i);
  }
  commit_copies();
}

// M: the arithmetic of the products.
template <class M>
MK_KERNEL_BLOCKS(kThreads, 3)
search_heads(MK_PARAM(Tiling) r) {
  using X = Stored<M>;
  constexpr int S = kSlots<X>;
  const TopkSearch& p = r.p;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, both = r.lists.length + r.queue;
  const int64_t tokens = p.lead.folded() * p.T;
  char* const shared = shared_memory();
  auto& block = *reinterpret_cast<SearchBlock<kTile<X>>*>(shared);
  auto* lists = reinterpret_cast<Key*>(shared + sizeof(block)) + warp * r.per_group * both;
  auto* scores = reinterpret_cast<float*>(shared + r.scores_at) + warp * r.per_group * S;
  locate(block, r);
  narrow(p, block, ranges_at(r.ranges_at), r.tokens, r.sharing * S);

  const Part part(r);
  const int64_t t0 = block.t0 + part.group * r.per_group;
  const bool busy = part.which < r.sharing && t0 < tokens;  // this warp has a token
  const SlotRange* ranges = ranges_at(r.ranges_at);
  if (ranges != nullptr) ranges += part.group * r.per_group;
  if (busy) clear_keys(lists, r.per_group * both);
  __syncwarp();
  load_heads<X>(r, block, tokens);
  Buffers buffers{shared + r.keys_at, r.buffer_bytes};
  const char* queries = shared + r.queries_at + part.group * r.products * 16 * r.query_pitch;
  const auto* weights = reinterpret_cast<const float*>(shared + r.weights_at) + part.group * r.products * 16;
  int turn = 0, queued = 0;  // lane j: what waits for token j
  prefetch<X>(r, block, buffers, turn, block.begin);

  for (int64_t first = block.begin; first < block.end; first += r.sharing * S, turn ^= 1) {
    const char* keys = buffers.arrived() + part.which * S * r.key_pitch;
    prefetch<X>(r, block, buffers, turn ^ 1, first + r.sharing * S);
    if (!busy) continue;
    float total[2][S / 4] = {};
#pragma unroll 1
    for (int product = 0; product < r.products; ++product) {
      Sums<M> sums[S / 8];
      add_products<M, S>(sums, queries + product * 16 * r.query_pitch, r.query_pitch, 0, keys, r.key_pitch,
                         int(p.K) * int(sizeof(X)));
      add_heads<M, S>(total, sums, weights, float(p.scale), product * 16, r, lane);
    }
    add_rows<S>(total, r.rows, scores, lane);
    __syncwarp();
#pragma unroll 1
    for (int j = 0; j < r.per_group && t0 + j < tokens; ++j) {
      int waiting = __shfl_sync(kAllLanes, queued, j);
      const KeptList kept{lists + j * both, r.lists.length, r.queue, p.k};
#pragma unroll 1
      for (int i = lane; i < S; i += 32) {
        const int64_t slot = first + part.which * S + i;
        const float extra = block.added[turn][part.which * S + i];
        const bool open = extra != -kInfinity && (ranges == nullptr || ranges[j].holds(slot));
        kept.offer(open ? key_of(scores[j * S + i] + extra, slot) : 0, waiting);
      }
      if (lane == j) queued = waiting;
    }
  }
  wait_copies<0>();
  if (!busy) return;
  for (int j = 0; j < r.per_group && t0 + j < tokens; ++j) {
    Key* list = lists + j * both;
    KeptList{list, r.lists.length, r.queue, p.k}.merge();
    const int64_t range = block.split * r.sharing + part.which;
    Key* out = r.lists.keys + (range * r.lists.rows + block.batch * tokens + t0 + j) * r.lists.length;
    for (int i = lane; i < r.lists.length; i += 32) out[i] = list[i];
  }
}

// Lays out blocks of so many groups and sharing warps. Returns the bytes of shared memory of a block.
template <class M>
int64_t lay_out(Tiling& r, int groups, int sharing) {
  using X = Stored<M>;
  constexpr int S = kSlots<X>;
  const TopkSearch& p = r.p;
  r.groups = groups, r.sharing = sharing, r.tokens = groups * r.per_group;
  r.tiles = div_up(p.lead.folded() * p.T, r.tokens);
  r.buffer_bytes = sharing * S * r.key_pitch;
  const int64_t rows = int64_t(groups) * r.products * 16;
  int64_t shared = int64_t(sizeof(SearchBlock<kTile<X>>)) +
                   int64_t(groups) * sharing * r.per_group * (r.lists.length + r.queue) * int64_t(sizeof(Key));
  auto place = [&](int& at, int64_t bytes) {
    at = int(shared);
    shared = round_up(shared + bytes, 16);
  };
  place(r.scores_at, int64_t(groups) * sharing * r.per_group * S * 4);
  place(r.weights_at, rows * 4);
  place(r.queries_at, rows * r.query_pitch);
  place(r.keys_at, kBuffers * int64_t(r.buffer_bytes));
  r.ranges_at = place_ranges(p, shared);
  return shared;
}

template <class M>
Lists run(const Device& device, const char* name, const IndexerSearch& q) {
  using X = Stored<M>;
  constexpr int kLeastQueue = 64, kMostQueue = 256;
  const TopkSearch& p = q.search;
  const int64_t tokens = p.lead.folded() * p.T, H = q.heads.H;
  Tiling r{};
  r.p = p, r.heads = q.heads;
  r.lists.length = list_length(name, p);
  r.queue = int(least(most(r.lists.length, kLeastQueue), kMostQueue));
  r.rows = 1;
  while (r.rows < 16 && r.rows < H) r.rows *= 2;
  if (H > 16) r.rows = int(round_up(H, 16));
  r.products = int(div_up(r.rows, 16)), r.per_group = int(most(1, 16 / r.rows));
  r.query_pitch = tile_pitch<X>(p.K), r.key_pitch = tile_pitch<X>(p.K);
  r.query_packs = in_packs(p.query, q.heads, p.lead, p.K), r.key_packs = in_packs(p.keys, p.lead, p.K);
  int groups = 1;
  while (groups < kWarps && groups * r.per_group < tokens) groups *= 2;
  for (; groups > 0; groups /= 2) {
    for (int sharing = kWarps / groups; sharing > 0; sharing /= 2) {
      const int64_t shared = lay_out<M>(r, groups, sharing);
      if (shared > device.shared) continue;
      cut_slots(device, r, sharing * kSlots<X>);
      r.lists.splits = r.splits * sharing, r.lists.rows = p.lead.batches() * tokens;
      r.lists.keys = device.scratch<Key>(r.lists.splits * r.lists.rows * r.lists.length);
      launch(device, name, search_heads<M>, p.lead.batches() * r.tiles * r.splits, kThreads, shared, r);
      return r.lists;
    }
  }
  return {};
}

}  // namespace

Lists search_heads_in_tiles(const Device& device, const char* name, const IndexerSearch& q) {
  const TopkSearch& p = q.search;
  constexpr int64_t kMostHeads = 1 << 12, kMostColumns = 1 << 12;  // bytes of a block's rows fit an int
  if (p.query.dtype != p.keys.dtype || q.heads.H > kMostHeads || p.K > kMostColumns) return {};
  const bool tf32_allowed = p.keys.dtype == DType::f32 && device.allows_tf32(device.owner);
  return with_arithmetic(p.keys.dtype, tf32_allowed, [&]<class M>() { return run<M>(device, name, q); });
}

}  // namespace mk::cuda
