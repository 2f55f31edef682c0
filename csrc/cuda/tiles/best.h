// The best slots of a token: 64-bit keys that sort as candidates rank, and sorted lists of them in shared memory, kept
// by a warp.
#pragma once

#include "cuda/tiles/numbers.h"

namespace mk::cuda {

using Key = uint64_t;  // score, then the smaller index; 0: no slot

// A larger key ranks first: NaN above +inf above ... above the lowest number. A score of -inf is no candidate.
MK_DEVICE Key key_of(float score, int64_t slot) {
  if (score == -kInfinity) return 0;
  const uint32_t u = __float_as_uint(score + 0.f);  // -0 and 0 are one score
  const uint32_t rank = score != score ? 0xffffffffu : u >> 31 ? ~u : u | 0x80000000u;
  return Key(rank) << 32 | uint32_t(~uint32_t(slot));
}
MK_DEVICE float score_of(Key key) {
  const uint32_t rank = uint32_t(key >> 32);
  return __uint_as_float(rank >> 31 ? rank ^ 0x80000000u : ~rank);
}
MK_DEVICE int64_t slot_of(Key key) { return int64_t(uint32_t(~uint32_t(key))); }

// One step of a bitonic network over n keys (a power of two): pairs `stride` apart, larger first in blocks of `block`.
MK_DEVICE void compare(Key* keys, int n, int block, int stride) {
#pragma unroll 1  // rarely more than two rounds, and the callers need the registers
  for (int i = int(threadIdx.x) & 31; i < n / 2; i += 32) {
    const int a = 2 * i - (i & (stride - 1)), b = a + stride;
    const Key x = keys[a], y = keys[b];
    if ((x < y) == ((a & block) == 0)) keys[a] = y, keys[b] = x;
  }
  __syncwarp();
}

MK_DEVICE void sort_keys(Key* keys, int n) {
  for (int block = 2; block <= n; block *= 2) {
    for (int stride = block / 2; stride > 0; stride /= 2) compare(keys, n, block, stride);
  }
}

// list[0, n) becomes the n best of itself and the first `count` of `other`, up to n, both sorted.
MK_DEVICE void merge_keys(Key* list, const Key* other, int n, int count) {
  for (int i = int(threadIdx.x) & 31; i < count; i += 32) {
    const Key y = other[i];
    if (list[n - 1 - i] < y) list[n - 1 - i] = y;
  }
  __syncwarp();
  for (int stride = n / 2; stride > 0; stride /= 2) compare(list, n, n, stride);
}

// Fills n keys with "no slot".
MK_DEVICE void clear_keys(Key* keys, int n) {
  for (int i = int(threadIdx.x) & 31; i < n; i += 32) keys[i] = 0;
}

// The k best candidates of a token so far, sorted, and behind them a queue of those that may join them. A warp keeps it
// in shared memory.
struct KeptList {
  Key* list;
  int length, queue;  // powers of two
  int64_t k;          // at most the length

  MK_DEVICE Key* waiting() const { return list + length; }

  // All lanes: merges the queue into the list.
  MK_DEVICE void merge() const {
    __syncwarp();
    sort_keys(waiting(), queue);
    merge_keys(list, waiting(), length, queue < length ? queue : length);
    clear_keys(waiting(), queue);
    __syncwarp();
  }

  // All lanes: appends those of their keys that exceed the k-th best to the queue, at positions from a ballot and
  // prefix sum. `queued` wait in it, before and after that at most queue - 32. A fuller queue is merged.
  MK_DEVICE void offer(Key key, int& queued) const {
    const int lane = int(threadIdx.x) & 31;
    const bool survives = key > list[k - 1];
    const unsigned survivors = __ballot_sync(kAllLanes, survives);
    if (survivors == 0) return;
    if (survives) waiting()[queued + __popc(survivors & ((1u << lane) - 1))] = key;
    queued += __popc(survivors);
    if (queued <= queue - 32) return;
    merge();
    queued = 0;
  }
};

}  // namespace mk::cuda
