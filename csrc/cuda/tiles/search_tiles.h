// What the searches in tiles share (topk_search_tiles.cu, indexer_search_tiles.cu): where a block is in its call, how
// its tiles of keys arrive, and how slots are cut into ranges.
#pragma once

#include "cuda/tiles/query_tiles.h"
#include "cuda/tiles/search_lists.h"

namespace mk::cuda {
namespace {

struct SearchTiling {
  TopkSearch p;
  Lists lists;
  int queue;           // length of a queue, a power of two
  int tokens;          // of a block
  int64_t tiles;       // of tokens, per batch
  int64_t splits;      // ranges of slots that blocks take
  int64_t split_rows;  // slots per range, whole tiles
  int query_pitch, key_pitch, buffer_bytes;
  bool query_packs, key_packs;
  int ranges_at;  // bytes of shared memory in front of the ranges of the tokens; 0: there are none
};

// S for an arithmetic, the slots of a product: half as many for float32, whose sums take twice the registers.
template <class X>
constexpr int kSlots = 128 / int(sizeof(X));

// What a block keeps in shared memory beside rows and lists: its position in the call, the memory of its batch, and the
// mask's terms in the scores of two tiles of up to S slots: the current one and the one being copied.
template <int S>
struct alignas(16) SearchBlock {
  int64_t t0, batch, split;  // the first token, of the batch; the range of slots
  int64_t begin, end;        // slots that are looked at, from the beginning of a tile on
  const char *keys, *mask;
  float added[2][S];
};

// Thread 0: finds the block's position in the call. Ends with a barrier.
template <int S>
MK_DEVICE void locate(SearchBlock<S>& block, const SearchTiling& r) {
  const TopkSearch& p = r.p;
  if (threadIdx.x == 0) {
    int64_t at = blockIdx.x;
    block.t0 = at % r.tiles * r.tokens;
    at /= r.tiles;
    block.split = at % r.splits, block.batch = at / r.splits;
    block.begin = block.split * r.split_rows, block.end = least(p.N, block.begin + r.split_rows);
    block.keys = p.keys.batch(p.lead, block.batch);
    block.mask = p.mask ? p.mask.batch(p.lead, block.batch) : nullptr;
  }
  __syncthreads();
}

// All threads: starts the copy of columns [column, column + columns) of the keys of slots [first, first + slots) into
// `buffer`, zeros past the range. The caller commits.
template <class X, int S>
MK_DEVICE void copy_keys(const SearchTiling& r, const SearchBlock<S>& block, int64_t first, int slots, int64_t column,
                         int64_t columns, char* buffer) {
  const char* from = block.keys + column * int64_t(sizeof(X));
  const int64_t end = block.end;
  copy_rows<X, kThreads>(int(threadIdx.x), slots, columns, r.key_packs, from, buffer, r.key_pitch,
                         [&](int i) { return first + i < end ? from + (first + i) * r.p.keys.row : nullptr; });
}

// The mask's term in the score of slot i; -inf past the range.
template <int S>
MK_DEVICE float added_to(const SearchTiling& r, const SearchBlock<S>& block, int64_t i) {
  return i < block.end ? mask_at(r.p.mask, block.mask, i) : -kInfinity;
}

// Cuts the slots into ranges of whole tiles of `slots`, enough to fill the GPU.
inline void cut_slots(const Device& device, SearchTiling& r, int64_t slots) {
  constexpr int64_t kLeastTiles = 4, kBlocksPerSm = 2;  // as in stream_plan.h
  const int64_t units = r.p.lead.batches() * r.tiles, tiles = most(1, div_up(r.p.N, slots));
  const int64_t wanted = div_up(device.sms * kBlocksPerSm, most(units, 1));
  r.split_rows = div_up(tiles, most(1, least(wanted, tiles / kLeastTiles))) * slots;
  r.splits = most(1, div_up(r.p.N, r.split_rows));
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
}  // namespace mk::cuda
