// The first pass of softmax_write: the softmax of every token. gated_write does the write itself.
//
//   top_t = max_i s[t, i],   left_t = rest_t / (1 + rest_t),
//   rest_t = sum of exp(s[t, i] - top_t) over all slots but the first at top
//
// The largest slot is left out of the sum, so that 1 - a of a gate near 1 is a sum of small numbers; 1 - 1 / (1 + rest)
// would cancel. One block per 32 tokens and range of slots, with enough ranges for about two blocks per SM. A second
// kernel merges them in the order of the slots.
#include "cuda/tiles/gates.h"

namespace mk::cuda {
namespace {

// One token over the slots seen so far. A maximum of -inf stands for no slot at all.
struct Seen {
  float top, rest;
  int64_t slot;

  MK_DEVICE void merge(const Seen& other) {
    const bool higher = other.top > top || (other.top == top && other.slot < slot);
    const float below = higher ? top : other.top, above = higher ? other.top : top;
    const float lower = higher ? rest : other.rest, upper = higher ? other.rest : rest;
    rest = upper + (below == -kInfinity ? lower : exponential(below - above) * (lower + 1));
    if (higher) top = other.top, slot = other.slot;
  }
  MK_DEVICE SoftmaxRow<float> row() const {
    if (top == kInfinity) return {top, 0, 0, -1};  // as in PyTorch: NaN where the score is infinite, 0 elsewhere
    if (rest != rest) return {0, rest, rest, -1};
    if (top == -kInfinity) return {0, 0, 0, -1};
    return {top, 1 / (1 + rest), rest / (1 + rest), slot};
  }
};

struct Ranges {
  Seen* parts;  // [batches][tokens][count]
  int64_t token_tiles, slots, count;
};

MK_KERNEL(kPairThreads) look_over(MK_PARAM(Pairs) p, MK_PARAM(Ranges) r) {
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  const int tx = int(threadIdx.x) % 8, ty = int(threadIdx.x) / 8;
  const int64_t range = blockIdx.x % r.count, t0 = blockIdx.x / r.count % r.token_tiles * kTile;
  const int64_t batch = blockIdx.x / r.count / r.token_tiles, tokens = p.lead.folded() * p.T;
  Seen seen[2] = {{-kInfinity, 0, -1}, {-kInfinity, 0, -1}};
  for (int64_t i0 = range * r.slots; i0 < least(p.N, (range + 1) * r.slots); i0 += kTile) {
    float s[2][4] = {};
    score_pairs(tile, p, batch, t0, i0, s);
#pragma unroll
    for (int x = 0; x < 2; ++x) {
#pragma unroll
      for (int y = 0; y < 4; ++y) seen[x].merge({s[x][y], 0, i0 + tx + 8 * y});
    }
  }
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    // Eight neighbouring lanes share a token.
#pragma unroll
    for (int d = 1; d < 8; d *= 2) {
      seen[x].merge({__shfl_xor_sync(kAllLanes, seen[x].top, d), __shfl_xor_sync(kAllLanes, seen[x].rest, d),
                     __shfl_xor_sync(kAllLanes, seen[x].slot, d)});
    }
    const int64_t t = t0 + ty + 16 * x;
    if (tx == 0 && t < tokens) r.parts[(batch * tokens + t) * r.count + range] = seen[x];
  }
}

MK_KERNEL(kPairThreads) merge_ranges(MK_PARAM(Ranges) r, int64_t tokens, SoftmaxRow<float>* rows) {
  const int64_t at = int64_t(blockIdx.x) * kPairThreads + threadIdx.x;
  if (at >= tokens) return;
  Seen seen = r.parts[at * r.count];
  for (int64_t n = 1; n < r.count; ++n) seen.merge(r.parts[at * r.count + n]);
  rows[at] = seen.row();
}

}  // namespace

const SoftmaxRow<float>* softmax_rows(const Device& device, const char* name, const Pairs& p) {
  const int64_t tokens = p.lead.folded() * p.T, all = p.lead.batches() * tokens;
  Ranges r{};
  r.token_tiles = div_up(tokens, kTile);
  const int64_t wanted = most(1, div_up(device.sms * 2, most(1, p.lead.batches() * r.token_tiles)));
  r.slots = most(1, round_up(div_up(p.N, wanted), kTile));
  r.count = div_up(p.N, r.slots);
  r.parts = device.scratch<Seen>(all * r.count);
  auto* rows = device.scratch<SoftmaxRow<float>>(all);
  launch(device, name, look_over, p.lead.batches() * r.token_tiles * r.count, kPairThreads, sizeof(Tile), p, r);
  launch(device, name, merge_ranges, div_up(all, kPairThreads), kPairThreads, 0, r, all, rows);
  return rows;
}

}  // namespace mk::cuda
