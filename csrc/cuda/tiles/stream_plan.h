// The layout of a call with few tokens over blocks (cuda/tiles/stream.h).
#pragma once

#include "cuda/tiles/device.h"
#include "cuda/tiles/stream.h"

namespace mk::cuda {

// The input of the plan. `value_columns`: columns of a value row that pass through a buffer, or 0.
struct StreamShape {
  const Lead& lead;
  int64_t T, N, K;
  const View& keys;
  int64_t value_columns, value_bytes;  // bytes of one number
  int64_t blocks_per_tile;             // blocks that share a tile of tokens and a split
  int queries;                         // Q
};

// Splits the slots for about two blocks per SM, each split with at least `kLeastTiles` tiles.
inline StreamPlan plan_stream(const Device& device, const StreamShape& s) {
  constexpr int64_t kLeastTiles = 4, kBlocksPerSm = 2;
  StreamPlan p{};
  const int64_t item = size_of(s.keys.dtype);
  const int64_t columns = least(s.K, kPart);
  const int64_t row = most(round_up(columns * item, 16), round_up(s.value_columns * s.value_bytes, 16)) + 16;
  p.slots = 64;
  while (p.slots > 4 && p.slots * row > 24 << 10) p.slots /= 2;
  p.stage_bytes = int(p.slots * row);
  p.key_parts = int(most(1, div_up(s.K, kPart)));
  p.padded = int(round_up(most(s.K, 1), 8));
  p.key_packs = in_packs(s.keys, s.lead, s.K);
  p.tiles = div_up(s.lead.folded() * s.T, s.queries);
  const int64_t units = s.lead.batches() * p.tiles * s.blocks_per_tile;
  const int64_t wanted = div_up(device.sms * kBlocksPerSm, most(units, 1));
  const int64_t tiles = most(1, div_up(s.N, p.slots));
  const int64_t splits = most(1, least(wanted, tiles / kLeastTiles));
  p.split_rows = div_up(tiles, splits) * p.slots;
  p.splits = most(1, div_up(s.N, p.split_rows));
  return p;
}

// Q for a call with so many tokens: 1 for one token, else 8 if their queries leave room for the buffers.
inline int queries_at_once(int64_t tokens, int64_t K) {
  constexpr int64_t kRoom = 24 << 10;
  return tokens > 1 && 8 * K * 4 <= kRoom ? 8 : 1;
}

// Calls body<Q>().
template <class Body>
void with_queries(int queries, Body&& body) {
  if (queries == 8) body.template operator()<8>();
  else body.template operator()<1>();
}

}  // namespace mk::cuda
