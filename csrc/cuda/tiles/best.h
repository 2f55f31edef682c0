// The best slots of a token: candidates as 64-bit keys that sort as they rank, and lists of them in shared memory, kept by a warp.
#pragma once

#include "cuda/tiles/numbers.h"

namespace mk::cuda {

using Key = uint64_t;  // score, then the smaller index; 0: no slot

// A larger key ranks before: NaN above +inf above ... above the lowest number. A score of -inf is no candidate.
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

// list[0, n) becomes the n best of itself and `other`, both sorted; `other` need not be longer than it is read, n keys.
MK_DEVICE void merge_keys(Key* list, const Key* other, int n) {
  for (int i = int(threadIdx.x) & 31; i < n; i += 32) {
    const Key y = other[n - 1 - i];
    if (list[i] < y) list[i] = y;
  }
  __syncwarp();
  for (int stride = n / 2; stride > 0; stride /= 2) compare(list, n, n, stride);
}

// n keys that are no slots.
MK_DEVICE void clear_keys(Key* keys, int n) {
  for (int i = int(threadIdx.x) & 31; i < n; i += 32) keys[i] = 0;
}

}  // namespace mk::cuda
