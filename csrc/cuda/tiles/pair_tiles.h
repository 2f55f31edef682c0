// Tiles of 32 tokens x 32 slots: their scores, weights and gradients of scores, for the ops that need all pairs. A
// block has 128 threads; each computes 2 x 4 pairs by plain multiply-adds from shared memory.
#pragma once

#include "cuda/tiles/slot_ranges.h"

namespace mk::cuda {

constexpr int kPairThreads = 128, kTile = 32, kPitch = 36;  // a row of a tile is 16-byte aligned

enum class Rule : int8_t {
  softmax,  // w = exp(s - lse - rest),       ds = w (<dr_t, v_i> + term_t)
  usage,    // w = exp(s - lse),              ds = w d_usage_i
  weights,  // w given, or as for softmax,     ds = w (dw + term_t)
  sigmoid,  // w given, or 1 / (1 + exp(-s)), ds = dw w (1 - w)
};

struct Pairs {
  Lead lead;
  int64_t T, N, K, V;
  View query, keys, values, mask;
  View range;                       // of the tokens, or none
  View lse, lse_rest, weights;      // results of the forward pass
  View d_read, d_weights, d_usage;  // gradients of results
  const float* terms;               // one per token, over all batches
  double scale;
  Rule rule;
};

// The shared memory of a tile.
struct Tile {
  float a[kTile][kTile + 1], b[kTile][kTile + 1];
  float w[kTile][kPitch], ds[kTile][kPitch];  // [slot][token] or [token][slot]
  char *a_rows[kTile], *b_rows[kTile];        // found by one warp only: addresses need slow divisions
  // One per token: null and 0 beyond the last one, and if a rule does not need them.
  const char *weights[kTile], *d_weights[kTile];
  float lse[kTile], rests[kTile], terms[kTile];
  SlotRange ranges[kTile];  // of the tokens, where they have ranges
};

// s[x][y] += sum over columns of a[ty + 16 x] b[tx + 8 y]; rows of null pointers are zero. All threads. Begins and ends
// with a barrier.
MK_DEVICE void multiply_rows(Tile& tile, DType a_type, DType b_type, int64_t width, float (&s)[2][4]) {
  const int tid = int(threadIdx.x), tx = tid % 8, ty = tid / 8, lane = tid % kTile;
  for (int64_t c0 = 0; c0 < width; c0 += kTile) {
    __syncthreads();
    for (int r = tid / kTile; r < kTile; r += kPairThreads / kTile) {
      const bool inside = c0 + lane < width;
      tile.a[r][lane] = inside && tile.a_rows[r] != nullptr ? load(tile.a_rows[r], a_type, c0 + lane) : 0.f;
      tile.b[r][lane] = inside && tile.b_rows[r] != nullptr ? load(tile.b_rows[r], b_type, c0 + lane) : 0.f;
    }
    __syncthreads();
#pragma unroll 8
    for (int c = 0; c < kTile; ++c) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
#pragma unroll
        for (int y = 0; y < 4; ++y) s[x][y] += tile.a[ty + 16 * x][c] * tile.b[tx + 8 * y][c];
      }
    }
  }
  __syncthreads();
}

// Points a_rows to tokens [t0, ...) of `tokens` and b_rows to open slots [i0, ...) of `slots`; null beyond.
MK_DEVICE void point(Tile& tile, const Pairs& p, int64_t batch, const View& tokens, int64_t t0, const View& slots,
                     int64_t i0) {
  __syncthreads();  // the old rows are no longer in use
  if (int(threadIdx.x) < kTile) {
    const int64_t t = t0 + threadIdx.x, i = i0 + threadIdx.x;
    tile.a_rows[threadIdx.x] =
        tokens && t < p.lead.folded() * p.T ? token_row(tokens, p.lead, tokens.batch(p.lead, batch), p.T, t) : nullptr;
    const bool open = i < p.N && mask_at(p.mask, p.mask ? p.mask.batch(p.lead, batch) : nullptr, i) != -kInfinity;
    tile.b_rows[threadIdx.x] = slots && open ? slots.batch(p.lead, batch) + i * slots.row : nullptr;
  }
  __syncthreads();
}

// The scores of a tile, of whose tokens the ranges are looked up; -inf where there is no slot, or none in the range.
MK_DEVICE void score_pairs(Tile& tile, const Pairs& p, int64_t batch, int64_t t0, int64_t i0, float (&s)[2][4]) {
  point(tile, p, batch, p.query, t0, p.keys, i0);
  multiply_rows(tile, p.query.dtype, p.keys.dtype, p.K, s);
  const char* mask = p.mask ? p.mask.batch(p.lead, batch) : nullptr;
  const int tx = int(threadIdx.x) % 8;
#pragma unroll
  for (int y = 0; y < 4; ++y) {
    const int64_t i = i0 + tx + 8 * y;
    const float added = i < p.N ? mask_at(p.mask, mask, i) : -kInfinity;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const bool open = added != -kInfinity && (!p.range || tile.ranges[int(threadIdx.x) / 8 + 16 * x].holds(i));
      s[x][y] = open ? score(float(p.scale), s[x][y], added) : -kInfinity;
    }
  }
}

// All threads: looks up the ranges of tokens [t0, ...). Returns the slots that some of them may address; all slots if
// tokens have no ranges. Begins and ends with a barrier.
MK_DEVICE SlotRange look_up_ranges(Tile& tile, const Pairs& p, int64_t batch, int64_t t0) {
  if (!p.range) return {0, p.N};
  __syncthreads();  // the old ranges are no longer in use
  if (int(threadIdx.x) < kTile) {
    tile.ranges[threadIdx.x] = range_of(p.range, p.lead, batch, p.T, t0 + threadIdx.x, p.N);
  }
  __syncthreads();
  return span_of(tile.ranges, kTile);
}

// The caller gives the `lse` of a usage, perhaps of a larger memory, so nothing bounds its weights.
MK_DEVICE float softmax_weight(Rule rule, float s, float lse, float rest) {
  if (s == -kInfinity || lse == -kInfinity) return 0;
  return rule == Rule::usage ? exponential(s - lse) : weight_of(s - lse - rest);
}

// acc[r] += factors[j][r] x_j for the 32 rows j of a tile; x_j is this thread's column of rows[j], 0 if that is null.
// inside(j, r): does x_j count in sum r, if it is not finite? 0 times NaN is NaN.
template <class Inside>
MK_DEVICE void add_rows(const float (&factors)[kTile][kPitch], const char* const* rows, DType dtype, int64_t column,
                        float (&acc)[kTile], Inside&& inside) {
  for (int j = 0; j < kTile; ++j) {
    if (rows[j] == nullptr) continue;
    const float x = load(rows[j], dtype, column);
    const bool finite = is_finite(x);
#pragma unroll
    for (int r = 0; r < kTile; r += 4) {
      const float4 f = *reinterpret_cast<const float4*>(&factors[j][r]);
      if (finite || inside(j, r)) acc[r] += f.x * x;
      if (finite || inside(j, r + 1)) acc[r + 1] += f.y * x;
      if (finite || inside(j, r + 2)) acc[r + 2] += f.z * x;
      if (finite || inside(j, r + 3)) acc[r + 3] += f.w * x;
    }
  }
}

MK_DEVICE void add_rows(const float (&factors)[kTile][kPitch], const char* const* rows, DType dtype, int64_t column,
                        float (&acc)[kTile]) {
  for (int j = 0; j < kTile; ++j) {
    if (rows[j] == nullptr) continue;
    const float x = load(rows[j], dtype, column);
#pragma unroll
    for (int r = 0; r < kTile; r += 4) {
      const float4 f = *reinterpret_cast<const float4*>(&factors[j][r]);
      acc[r] += f.x * x, acc[r + 1] += f.y * x, acc[r + 2] += f.z * x, acc[r + 3] += f.w * x;
    }
  }
}

}  // namespace mk::cuda
