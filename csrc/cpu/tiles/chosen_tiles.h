// Ops on slots that are named, not searched: tasks of as many tokens as have kTileBytes of chosen rows.
#pragma once

#include "cpu/tiles/segments.h"

namespace mk::MK_ISA {

// Tasks take ranges of tokens of one batch. `bytes`: of one chosen row.
struct ChosenTiles {
  static constexpr int64_t kTileBytes = 1 << 18;
  int64_t tokens, tile, tiles, tasks;

  ChosenTiles(const Choice& c, int64_t bytes) : tokens(c.tokens()) {
    tile = most(1, least(tokens, kTileBytes / most(1, c.k * bytes)));
    tiles = div_up(tokens, tile);
    tasks = c.lead.batches() * tiles;
  }
  int64_t batch(int64_t task) const { return task / tiles; }
  int64_t first(int64_t task) const { return task % tiles * tile; }
  int64_t end(int64_t task) const { return least(first(task) + tile, tokens); }
};

}  // namespace mk::MK_ISA
