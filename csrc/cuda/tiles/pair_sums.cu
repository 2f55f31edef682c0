// Sums over all pairs of tokens and slots (pair_sums.h says which):
//   by tokens: one block per 32 tokens and 128 columns;   by slots: one block per 32 slots and 128 columns
// Both passes compute the tiles again, so nothing of size [T, N] is stored, and every sum has one fixed order, without
// atomics. A thread owns one column and 32 rows of a result in registers.
#include "cuda/tiles/pair_sums.h"

namespace mk::cuda {
namespace {

// The tile of rows and the block of columns of a block.
struct Part {
  int64_t batch, first, block;
  MK_DEVICE Part(int64_t tiles, int64_t blocks) {
    int64_t at = blockIdx.x;
    block = at % blocks;
    at /= blocks;
    first = at % tiles * kTile;
    batch = at / tiles;
  }
};

// One number of token t.
MK_DEVICE float of_token(const View& v, const Pairs& p, int64_t batch, int64_t t) {
  return *reinterpret_cast<const float*>(token_row(v, p.lead, v.batch(p.lead, batch), p.T, t));
}

// Looks up the data of token t, which is row threadIdx.x of the tile.
MK_DEVICE void look_up(Tile& tile, const Pairs& p, int64_t batch, int64_t t) {
  const int64_t tokens = p.lead.folded() * p.T;
  const int row = int(threadIdx.x);
  const bool there = t < tokens;
  auto row_of = [&](const View& v) -> char* {
    return v && there ? token_row(v, p.lead, v.batch(p.lead, batch), p.T, t) : nullptr;
  };
  tile.weights[row] = row_of(p.weights), tile.d_weights[row] = row_of(p.d_weights);
  const auto* lse = reinterpret_cast<const float*>(row_of(p.lse));
  const auto* rest = reinterpret_cast<const float*>(row_of(p.lse_rest));
  tile.lse[row] = lse == nullptr ? 0.f : *lse, tile.rests[row] = rest == nullptr ? 0.f : *rest;
  tile.terms[row] = p.terms != nullptr && there ? p.terms[batch * tokens + t] : 0.f;
}

// The sum of this thread's column of a tile. Sums of many tiles are added up in double, since a usage counts: a float
// that has reached 2^24 no longer changes by 1.
MK_DEVICE float column_sum(const float (&x)[kTile][kPitch]) {
  float sum = 0;
  for (int j = 0; j < kTile; ++j) sum += x[j][threadIdx.x];
  return sum;
}

// acc += part, the sum of one tile; two-level sums round less.
MK_DEVICE void add_part(const float (&part)[kTile], float (&acc)[kTile]) {
#pragma unroll
  for (int r = 0; r < kTile; ++r) acc[r] += part[r];
}

// Fills tile.w and tile.ds; pairs that do not exist, or are out of range, are 0. `by_slots`: slots run along the rows
// of a tile, for sums over tokens.
template <bool by_slots>
MK_DEVICE void weigh(Tile& tile, const Pairs& p, int64_t batch, int64_t t0, int64_t i0) {
  const int tx = int(threadIdx.x) % 8, ty = int(threadIdx.x) / 8;
  const int64_t tokens = p.lead.folded() * p.T;
  const bool given = bool(p.weights);
  float s[2][4] = {}, dw[2][4] = {};
  __syncthreads();  // the sums of the previous tile are done
  if (int(threadIdx.x) < kTile) look_up(tile, p, batch, t0 + threadIdx.x);
  __syncthreads();
  if (!given) score_pairs(tile, p, batch, t0, i0, s);
  if (p.rule == Rule::softmax && p.d_read && p.V > 0) {
    point(tile, p, batch, p.d_read, t0, p.values, i0);
    multiply_rows(tile, p.d_read.dtype, p.values.dtype, p.V, dw);
  }
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const int row = ty + 16 * x;
    const float lse = tile.lse[row], rest = tile.rests[row], term = tile.terms[row];
#pragma unroll
    for (int y = 0; y < 4; ++y) {
      const int64_t i = i0 + tx + 8 * y;
      float w = 0, ds = 0;
      if (t0 + row < tokens && i < p.N && (!p.range || tile.ranges[row].holds(i))) {
        w = given ? load(tile.weights[row], p.weights.dtype, i) : softmax_weight(p.rule, s[x][y], lse, rest);
        float d = dw[x][y];
        if (given) d = load(tile.d_weights[row], p.d_weights.dtype, i);
        else if (p.rule == Rule::usage && p.d_usage)
          d = *reinterpret_cast<const float*>(p.d_usage.batch(p.lead, batch) + i * p.d_usage.row);
        ds = w == 0 ? 0.f : p.rule == Rule::sigmoid ? d * w * (1 - w) : w * (d + term);
      }
      (by_slots ? tile.w[row][tx + 8 * y] : tile.w[tx + 8 * y][row]) = w;
      (by_slots ? tile.ds[row][tx + 8 * y] : tile.ds[tx + 8 * y][row]) = ds;
    }
  }
  __syncthreads();
}

MK_KERNEL(kPairThreads) sum_by_tokens(MK_PARAM(Pairs) p, MK_PARAM(PairSums) out, int64_t tiles, int64_t blocks) {
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  const Part part(tiles, blocks);
  const int64_t column = part.block * kPairThreads + threadIdx.x, tokens = p.lead.folded() * p.T;
  float acc[kTile] = {};
  double total = 0;
  const SlotRange span = look_up_ranges(tile, p, part.batch, part.first);
  for (int64_t i0 = span.first / kTile * kTile; i0 < span.stop; i0 += kTile) {
    float sums[kTile] = {};
    weigh<false>(tile, p, part.batch, part.first, i0);
    point(tile, p, part.batch, p.query, part.first, p.keys, i0);
    if (out.d_query && column < p.K) {
      auto inside = [&](int j, int r) { return tile.ranges[r].holds(i0 + j); };
      if (p.range) add_rows(tile.ds, tile.b_rows, p.keys.dtype, column, sums, inside);
      else add_rows(tile.ds, tile.b_rows, p.keys.dtype, column, sums);
    }
    add_part(sums, acc);
    if (int(threadIdx.x) < kTile) total += column_sum(tile.ds);
  }
  point(tile, p, part.batch, out.d_query, part.first, View{}, 0);
#pragma unroll
  for (int r = 0; r < kTile; ++r) {
    if (tile.a_rows[r] == nullptr || column >= p.K) continue;
    reinterpret_cast<float*>(tile.a_rows[r])[column] = float(p.scale) * acc[r];
  }
  if (out.d_lse && column < kTile && part.first + column < tokens) {
    char* row = token_row(out.d_lse, p.lead, out.d_lse.batch(p.lead, part.batch), p.T, part.first + column);
    *reinterpret_cast<float*>(row) = float(-total);
  }
}

// Blocks for the columns of K come first, then those of V. The first block also sums the single numbers per slot.
MK_KERNEL(kPairThreads)
sum_by_slots(MK_PARAM(Pairs) p, MK_PARAM(PairSums) out, int64_t tiles, int64_t blocks, int64_t key_blocks) {
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  const Part part(tiles, blocks);
  const bool of_keys = part.block < key_blocks;
  const int64_t column = (of_keys ? part.block : part.block - key_blocks) * kPairThreads + threadIdx.x;
  const View &rows = of_keys ? p.query : p.d_read, &result = of_keys ? out.d_keys : out.d_values;
  const bool mine = result && rows && column < (of_keys ? p.K : p.V);
  const int64_t tokens = p.lead.folded() * p.T;
  float acc[kTile] = {};
  double total = 0;
  for (int64_t t0 = 0; t0 < tokens; t0 += kTile) {
    const SlotRange span = look_up_ranges(tile, p, part.batch, t0);
    if (span.first >= part.first + kTile || span.stop <= part.first) continue;
    float sums[kTile] = {};
    weigh<true>(tile, p, part.batch, t0, part.first);
    point(tile, p, part.batch, rows, t0, p.keys, part.first);
    if (mine) {
      auto inside = [&](int j, int r) { return tile.ranges[j].holds(part.first + r); };
      if (p.range) add_rows(of_keys ? tile.ds : tile.w, tile.a_rows, rows.dtype, column, sums, inside);
      else add_rows(of_keys ? tile.ds : tile.w, tile.a_rows, rows.dtype, column, sums);
    }
    add_part(sums, acc);
    if (int(threadIdx.x) < kTile) total += column_sum(out.usage ? tile.w : tile.ds);
  }
  if (result && column < (of_keys ? p.K : p.V)) {
    char* row = result.batch(p.lead, part.batch) + part.first * result.row;
#pragma unroll
    for (int r = 0; r < kTile; ++r, row += result.row) {
      if (part.first + r < p.N) reinterpret_cast<float*>(row)[column] = (of_keys ? float(p.scale) : 1.f) * acc[r];
    }
  }
  const View& sums = out.usage ? out.usage : out.d_mask;
  if (sums && part.block == 0 && int(threadIdx.x) < kTile && part.first + threadIdx.x < p.N) {
    *reinterpret_cast<float*>(sums.batch(p.lead, part.batch) + (part.first + threadIdx.x) * sums.row) = float(total);
  }
}

MK_KERNEL(kPairThreads) write_weights(MK_PARAM(Pairs) p, MK_PARAM(View) weights, int64_t tiles, int64_t slot_tiles) {
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  const Part part(tiles, slot_tiles);
  const int64_t i0 = part.block * kTile;
  float s[2][4] = {};
  look_up_ranges(tile, p, part.batch, part.first);
  score_pairs(tile, p, part.batch, part.first, i0, s);
  point(tile, p, part.batch, weights, part.first, View{}, 0);
  if (int(threadIdx.x) < kTile) look_up(tile, p, part.batch, part.first + threadIdx.x);
  __syncthreads();
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const int token = int(threadIdx.x) / 8 + 16 * x;
    char* row = tile.a_rows[token];
    if (row == nullptr) continue;
    const float lse = tile.lse[token], rest = tile.rests[token];
#pragma unroll
    for (int y = 0; y < 4; ++y) {
      const int64_t i = i0 + int(threadIdx.x) % 8 + 8 * y;
      if (i >= p.N) continue;
      const float w =
          p.rule == Rule::sigmoid ? 1 / (1 + exponential(-s[x][y])) : softmax_weight(p.rule, s[x][y], lse, rest);
      store(row, weights.dtype, i, w);
    }
  }
}

// terms[t] = d_lse_t - <a_t, b_t>, one warp per token. A missing row counts as zero.
MK_KERNEL(kPairThreads)
subtract_products(MK_PARAM(Pairs) p, MK_PARAM(View) a, MK_PARAM(View) b, MK_PARAM(View) d_lse, int64_t width,
                  float* terms) {
  const int64_t tokens = p.lead.folded() * p.T, at = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
  if (at >= tokens * p.lead.batches()) return;
  const int64_t batch = at / tokens, t = at % tokens;
  float sum = 0;
  if (a && b) {
    const char* x = token_row(a, p.lead, a.batch(p.lead, batch), p.T, t);
    const char* y = token_row(b, p.lead, b.batch(p.lead, batch), p.T, t);
    for (int64_t c = threadIdx.x % 32; c < width; c += 32) sum += load(x, a.dtype, c) * load(y, b.dtype, c);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) terms[at] = (d_lse ? of_token(d_lse, p, batch, t) : 0.f) - sum;
}

void by_tokens(const Device& device, const char* name, const Pairs& p, const PairSums& out) {
  const int64_t tiles = div_up(p.lead.folded() * p.T, kTile);
  const int64_t blocks = out.d_query ? most(1, div_up(p.K, kPairThreads)) : 1;
  launch(device, name, sum_by_tokens, p.lead.batches() * tiles * blocks, kPairThreads, sizeof(Tile), p, out, tiles,
         blocks);
}

}  // namespace

const float* terms_of(const Device& device, const char* name, const Pairs& p, const View& a, const View& b,
                      const View& d_lse, int64_t width) {
  const int64_t all = p.lead.batches() * p.lead.folded() * p.T;
  auto* terms = device.scratch<float>(all);
  launch(device, name, subtract_products, div_up(all, 4), kPairThreads, 0, p, a, b, d_lse, width, terms);
  return terms;
}

void sum_pairs_by_slots(const Device& device, const char* name, const Pairs& p, const PairSums& out) {
  const int64_t tiles = div_up(p.N, kTile), keys = out.d_keys ? most(1, div_up(p.K, kPairThreads)) : 1;
  const int64_t blocks = keys + (out.d_values ? div_up(p.V, kPairThreads) : 0);
  launch(device, name, sum_by_slots, p.lead.batches() * tiles * blocks, kPairThreads, sizeof(Tile), p, out, tiles,
         blocks, keys);
}

void sum_pairs(const Device& device, const char* name, const Pairs& p, const PairSums& out) {
  if (out.d_query || out.d_lse) by_tokens(device, name, p, out);
  if (out.d_keys || out.d_values || out.d_mask) sum_pairs_by_slots(device, name, p, out);
}

void weigh_pairs(const Device& device, const char* name, const Pairs& p, const View& weights) {
  const int64_t tiles = div_up(p.lead.folded() * p.T, kTile), slot_tiles = div_up(p.N, kTile);
  launch(device, name, write_weights, p.lead.batches() * tiles * slot_tiles, kPairThreads, sizeof(Tile), p, weights,
         tiles, slot_tiles);
}

}  // namespace mk::cuda
