// The queries of a block of 64 tokens, 16 per warp: the left side of products with tiles of keys on the tensor cores.
#pragma once

#include "cuda/tiles/buffers.h"
#include "cuda/tiles/fragments.h"
#include "cuda/tiles/slot_ranges.h"

namespace mk::cuda {
namespace {

constexpr int kThreads = 128, kTokens = 64;

// All threads: looks up the ranges of the tokens of a block, if there are any, and narrows its slots [begin, end) to
// the tiles of S that some token may address. Ends with a barrier.
template <class Params, class Shared>
MK_DEVICE void narrow(const Params& p, Shared& block, SlotRange* ranges, int tokens, int S) {
  if (ranges == nullptr) return;
  const int tid = int(threadIdx.x);
  if (tid < tokens) ranges[tid] = range_of(p.range, p.lead, block.batch, p.T, block.t0 + tid, p.N);
  __syncthreads();
  if (tid == 0) {
    const SlotRange span = span_of(ranges, tokens);
    block.begin = most(block.begin, span.first / S * S), block.end = least(block.end, span.stop);
  }
  __syncthreads();
}

// The ranges of the tokens of a block [64], `at` bytes behind the begin of its shared memory; null if at is 0.
MK_DEVICE SlotRange* ranges_at(int at) {
  return at == 0 ? nullptr : reinterpret_cast<SlotRange*>(shared_memory() + at);
}

// Adds room for 64 of them to the shared memory of a block. Returns where they are; 0 if tokens have no ranges.
template <class Params>
int place_ranges(const Params& p, int64_t& shared) {
  if (!p.range) return 0;
  const int64_t at = round_up(shared, 16);
  shared = at + kTokens * int64_t(sizeof(SlotRange));
  return int(at);
}

// The queries of a warp [16, K]: rows in shared memory or, if `held`, their fragments in registers. Held rows have up
// to 256 bytes.
template <class M, bool held>
struct Queries {
  static constexpr int kSteps = held ? 256 / 32 : 1;
  const char* rows;
  Left<M> fragments[kSteps];

  // All threads: loads the queries of a block [64, K] into `tile`, zeros from token `tokens` of the batch on. If
  // `held`, the tile is free afterwards; else the queries arrive with the first keys.
  template <class Tiling, class Shared>
  MK_DEVICE void load(const Tiling& r, const Shared& block, int64_t tokens, char* tile) {
    const auto& p = r.p;
    const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32;
    const int64_t t0 = block.t0;
    char* base = p.query.batch(p.lead, block.batch);
    rows = tile + warp * 16 * r.query_pitch;
    copy_rows<Stored<M>, kThreads>(tid, kTokens, p.K, r.query_packs, base, tile, r.query_pitch,
                                   [&](int i) -> const char* {
                                     return t0 + i < tokens ? token_row(p.query, p.lead, base, p.T, t0 + i) : nullptr;
                                   });
    if constexpr (held) {
      commit_copies();
      wait_copies<0>();
      __syncthreads();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step * 32 < r.query_pitch - 16) load_left(fragments[step].x, rows, r.query_pitch, step * 32, lane);
      }
      __syncthreads();
    }
  }

  // sums [16, S] += queries, from byte `at` of each, times S rows of keys, `bytes` of each.
  template <int S, class Tiling>
  MK_DEVICE void multiply(Sums<M> (&sums)[S / 8], const Tiling& r, const char* keys, int at, int bytes) const {
    if constexpr (held) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step * 32 < bytes) add_step<M, S>(sums, fragments[step], keys, r.key_pitch, step, int(threadIdx.x) % 32);
      }
    } else {
      add_products<M, S>(sums, rows, r.query_pitch, at, keys, r.key_pitch, bytes);
    }
  }
};

}  // namespace
}  // namespace mk::cuda
