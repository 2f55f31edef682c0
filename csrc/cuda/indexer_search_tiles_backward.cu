// The gradients of query and head weights of indexer_search (indexer_search.cu), in tiles on the tensor cores.
//
// A block of four warps has a token and up to 64 of its heads, 16 for each warp; where heads are fewer, warps share
// them and take different slots of a tile. The chosen keys of the token, 32 for each warp that shares heads or 16 in
// float32, are gathered into one of two buffers, by cp.async, while the other is used: once for all heads. Products of
// queries and keys say by their signs which gradients of scores count, and these times the same keys are added to y, 16
// heads and up to 128 columns in registers. Gradients of scores have the dtype of the keys, so nothing is rounded for
// the second product. Warps that share heads add their sums in order at the end.
//
// The signs are left in memory for the gradient of the keys (segments.cu).
#include "cuda/tiles/buffers.h"
#include "cuda/tiles/fragments.h"
#include "cuda/tiles/head_signs.h"
#include "cuda/tiles/search_tiles.h"

namespace mk::cuda {
namespace {

constexpr int kWarps = kThreads / 32, kHeads = 16, kColumns = 128;
constexpr int kMost = 32;  // chosen slots of a warp in a tile

// J for an arithmetic: half as many for float32, whose fragments take twice the registers.
template <class X>
constexpr int kChosen = 64 / int(sizeof(X));

struct Gradients {
  IndexerSearchBackward b;
  View ds;  // of the chosen scores
  Signs signs;
  int groups, sharing;  // of 16 heads in a block; warps that share one
  int64_t passes;       // blocks per token
  int pitch, buffer_bytes, queries_at, keys_at;
  bool query_packs, key_packs;
};

// What a block keeps in shared memory beside rows: of two tiles, the gradients of scores, 0 where there is no slot, and
// what is added to the products, NaN for an index outside the memory.
struct Shared {
  float ds[2][kWarps * kMost], added[2][kWarps * kMost];
};

struct Block {
  const Gradients& r;
  int64_t at, batch, t, head;  // the token, of all batches and of its own; the first head
  const int64_t* index;
  const float* ds;
  const char* keys;

  MK_DEVICE explicit Block(const Gradients& gradients) : r(gradients) {
    const Choice& c = r.b.search.choice;
    at = blockIdx.x / r.passes, head = blockIdx.x % r.passes * (r.groups * kHeads);
    batch = at / c.tokens(), t = at % c.tokens();
    index = reinterpret_cast<const int64_t*>(row(c.indices));
    ds = reinterpret_cast<const float*>(row(r.ds));
    keys = r.b.search.keys.batch(c.lead, batch);
  }
  MK_DEVICE char* row(const View& v) const {
    const Choice& c = r.b.search.choice;
    return token_row(v, c.lead, v.batch(c.lead, batch), c.T, t);
  }
  MK_DEVICE bool inside(int64_t slot) const { return slot >= 0 && slot < r.b.search.choice.N; }
};

// Starts the copy of the keys of chosen slots [first, first + slots), and stores what belongs to them.
template <class X>
MK_DEVICE void prefetch(const Block& block, Shared& shared, Buffers& buffers, int turn, int64_t first) {
  const Gradients& r = block.r;
  const TopkSearchBackward& s = r.b.search;
  const int slots = r.sharing * kChosen<X>, tid = int(threadIdx.x);
  char* buffer = buffers.next();
  auto slot_of = [&](int i) { return first + i < s.choice.k ? block.index[first + i] : int64_t(-1); };
  if (first < s.choice.k) {
    copy_rows<X, kThreads>(tid, slots, s.K, r.key_packs, block.keys, buffer, r.pitch, [&](int i) -> const char* {
      const int64_t slot = slot_of(i);
      return block.inside(slot) ? block.keys + slot * s.keys.row : nullptr;
    });
    if (tid < slots) {
      const int64_t slot = slot_of(tid);
      const float nowhere = slot == -1 || block.inside(slot) ? 0.f : __uint_as_float(0x7fc00000u);
      shared.added[turn][tid] = nowhere;
      shared.ds[turn][tid] = block.inside(slot) ? block.ds[first + tid] : nowhere;
    }
  }
  commit_copies();
}

// Bits 0, 4, 8 to 28 of x side by side.
MK_DEVICE unsigned every_fourth(unsigned x) {
  x &= 0x11111111u;
  x = (x | x >> 3) & 0x03030303u;
  x = (x | x >> 6) & 0x000f000fu;
  return (x | x >> 12) & 0xffu;
}

// Turns products of 16 heads with J keys into the gradients of scores that count. Returns the signs of column `lane`,
// if there is one, a bit for every head.
template <class M, int J>
MK_DEVICE unsigned select(float (&g)[J / 8][4], const Sums<M> (&sums)[J / 8], const float* ds, const float* added,
                          float scale, int lane) {
  unsigned low = 0, high = 0;
#pragma unroll
  for (int n = 0; n < J / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = n * 8 + lane % 4 * 2 + e;
      const bool first = !(scale * sums[n][e] + added[column] <= 0);
      const bool second = !(scale * sums[n][2 + e] + added[column] <= 0);
      g[n][e] = first ? ds[column] : 0.f, g[n][2 + e] = second ? ds[column] : 0.f;
      const unsigned firsts = __ballot_sync(kAllLanes, first), seconds = __ballot_sync(kAllLanes, second);
      if (lane / 8 == n && lane % 2 == e) low = firsts, high = seconds;
    }
  }
  const int shift = lane % 8 / 2;
  return every_fourth(low >> shift) | every_fourth(high >> shift) << 8;
}

// The sums of the warps that share heads, added in order into those of the first. All threads.
MK_DEVICE void add_shared(float (&y)[kColumns / 8][4], const Gradients& r, int which, int group, int lane, char* room) {
  auto* sums = reinterpret_cast<float*>(room);
  __syncthreads();  // the buffers are free
  auto at = [&](int w, int i) { return ((w - 1) * r.groups + group) * kColumns / 2 * 32 + i * 32 + lane; };
  if (which > 0 && which < r.sharing) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) sums[at(which, i)] = y[i / 4][i % 4];
  }
  __syncthreads();
  if (which > 0) return;
  for (int w = 1; w < r.sharing; ++w) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) y[i / 4][i % 4] += sums[at(w, i)];
  }
}

// Stores the gradients of 16 heads from their y, less the scale. `queries`: their rows in shared memory.
template <class X>
MK_DEVICE void store_gradients(const Block& block, const float (&y)[kColumns / 8][4], const char* queries, int64_t head,
                               int lane) {
  const Gradients& r = block.r;
  const TopkSearchBackward& s = r.b.search;
  const Heads& heads = r.b.heads;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * 8;
    const int64_t h = head + row;
    const bool there = h < heads.H;
    const float w = there ? load(block.row(heads.weights), heads.weights.dtype, h) : 0.f;
    char* out = s.d_query && there ? block.row(s.d_query) + h * r.b.d_stride : nullptr;
    const X* query = reinterpret_cast<const X*>(queries + row * r.pitch);
    float product = 0;
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) {
      const int column = i / 2 * 8 + lane % 4 * 2 + i % 2;
      if (column >= s.K) continue;
      const float x = float(s.scale) * y[i / 2][2 * half + i % 2];
      product += x * to_float(query[column]);
      if (out != nullptr) store(out, s.d_query.dtype, column, w * x);
    }
    product += __shfl_xor_sync(kAllLanes, product, 1);
    product += __shfl_xor_sync(kAllLanes, product, 2);
    if (r.b.d_weights && there && lane % 4 == 0) store(block.row(r.b.d_weights), r.b.d_weights.dtype, h, product);
  }
}

// M: the arithmetic of the products.
template <class M>
MK_KERNEL_BLOCKS(kThreads, 3)
head_gradients(MK_PARAM(Gradients) r) {
  using X = Stored<M>;
  constexpr int J = kChosen<X>, kSteps = J * int(sizeof(X)) / 32;
  const TopkSearchBackward& s = r.b.search;
  const int lane = int(threadIdx.x) % 32, group = int(threadIdx.x) / 32 % r.groups;
  const int which = int(threadIdx.x) / 32 / r.groups;
  const Block block(r);
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  char *rows = shared_memory() + r.queries_at, *room = shared_memory() + r.keys_at;
  char* from = block.row(s.query);
  copy_rows<X, kThreads>(int(threadIdx.x), r.groups * kHeads, s.K, r.query_packs, from, rows, r.pitch,
                         [&](int i) -> const char* {
                           const int64_t h = block.head + i;
                           return h < r.b.heads.H ? from + h * r.b.heads.stride : nullptr;
                         });
  const char* queries = rows + group * kHeads * r.pitch;
  const int64_t head = block.head + group * kHeads;
  const bool busy = which < r.sharing && head < r.b.heads.H;
  Buffers buffers{room, r.buffer_bytes};
  int turn = 0;
  prefetch<X>(block, shared, buffers, turn, 0);

  float y[kColumns / 8][4] = {};
  for (int64_t first = 0; first < s.choice.k; first += r.sharing * J, turn ^= 1) {
    const char* keys = buffers.arrived() + which * J * r.pitch;
    prefetch<X>(block, shared, buffers, turn ^ 1, first + r.sharing * J);
    if (!busy) continue;
    Sums<M> sums[J / 8];
    add_products<M, J>(sums, queries, r.pitch, 0, keys, r.pitch, int(s.K) * int(sizeof(X)));
    float g[J / 8][4];
    const unsigned signs =
        select<M, J>(g, sums, shared.ds[turn] + which * J, shared.added[turn] + which * J, float(s.scale), lane);
    const int64_t j = first + which * J + lane;
    if (lane < J && j < s.choice.k) r.signs.of(block.at * s.choice.k + j)[head / kHeads] = uint16_t(signs);
    Left<M> left[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) left[step] = weights_left<M>(g, step);
    const float drop[2] = {1, 1};
    add_weighted<M, kSteps, kColumns>(y, left, drop, keys, r.pitch, s.K, lane);
  }
  wait_copies<0>();
  if (r.sharing > 1) add_shared(y, r, which, group, lane, room);
  if (busy && which == 0) store_gradients<X>(block, y, queries, head, lane);
}

template <class M>
bool run(const Device& device, const char* name, Gradients& r) {
  using X = Stored<M>;
  const TopkSearchBackward& s = r.b.search;
  const int64_t groups = div_up(r.b.heads.H, kHeads);
  r.pitch = tile_pitch<X>(s.K);
  r.groups = 1;
  while (r.groups < kWarps && r.groups < groups) r.groups *= 2;
  r.passes = div_up(groups, r.groups);
  r.queries_at = int(sizeof(Shared)), r.keys_at = r.queries_at + r.groups * kHeads * r.pitch;
  for (r.sharing = kWarps / r.groups; r.sharing > 0; r.sharing /= 2) {
    r.buffer_bytes = r.sharing * kChosen<X> * r.pitch;
    const int64_t sums = int64_t(r.sharing - 1) * r.groups * kColumns / 2 * 32 * 4;
    const int64_t bytes = r.keys_at + most(sums, kBuffers * int64_t(r.buffer_bytes));
    if (bytes > device.shared) continue;
    launch(device, name, head_gradients<M>, s.choice.all_tokens() * r.passes, kThreads, bytes, r);
    return true;
  }
  return false;
}

}  // namespace

bool head_gradients_in_tiles(const Device& device, const char* name, const IndexerSearchBackward& b, const View& ds,
                             const Signs& signs) {
  const TopkSearchBackward& s = b.search;
  const Choice& c = s.choice;
  const DType dtype = s.keys.dtype;
  if (s.query.dtype != dtype || s.d_scores.dtype != dtype || s.K > kColumns || b.heads.H == 0) return false;
  Gradients r{};
  r.b = b, r.ds = ds, r.signs = signs;
  r.query_packs = in_packs(s.query, b.heads, c.lead, s.K), r.key_packs = in_packs(s.keys, c.lead, s.K);
  const bool tf32_allowed = dtype == DType::f32 && device.allows_tf32(device.owner);
  return with_arithmetic(dtype, tf32_allowed, [&]<class M>() { return run<M>(device, name, r); });
}

}  // namespace mk::cuda
