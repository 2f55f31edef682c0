// Launches of the gradients of softmax_read in tiles (cuda/tiles/gradient_tiles.h has the kernels).
#pragma once

#include "cuda/tiles/gradient_tiles.h"

namespace mk::cuda {
namespace {

struct Layout {
  Tiling g{};
  int64_t shared = 0;
};

template <class M, class W, Of of>
Layout lay_out(const SoftmaxReadBackward& b) {
  using X = Stored<M>;
  using V = std::conditional_t<of == Of::values, X, W>;  // the type in shared memory of rows of V columns
  constexpr int S = kTile<X, W, of>;
  const SoftmaxRead& p = b.forward;
  Layout a;
  Tiling& g = a.g;
  g.b = b;
  const int64_t tokens = p.lead.folded() * p.T;
  g.rows = of == Of::query ? tokens : p.N, g.others = of == Of::query ? p.N : tokens;
  g.tiles = div_up(g.rows, kRows);
  g.key_parts = int(most(1, div_up(p.K, kColumns))), g.value_parts = int(div_up(p.V, kColumns));
  g.blocks = of == Of::values ? g.value_parts : of == Of::keys && !b.d_keys ? 1 : g.key_parts;
  g.key_pitch = tile_pitch<X>(p.K), g.value_pitch = tile_pitch<V>(p.V);
  g.key_step = tile_pitch<X>(least(p.K, kColumns)), g.value_step = tile_pitch<V>(least(p.V, kColumns));
  g.buffer_bytes = S * int(most(g.key_step, g.value_step));
  g.query_packs = in_packs(p.query, p.lead, p.K), g.key_packs = in_packs(p.keys, p.lead, p.K);
  g.value_packs = in_packs(p.values, p.lead, p.V), g.read_packs = in_packs(b.d_read, p.lead, p.V);
  a.shared = int64_t(sizeof(Shared<S>)) + kBuffers * int64_t(g.buffer_bytes) +
             kRows * (int64_t(g.key_pitch) + (of == Of::values ? 0 : g.value_pitch));
  if (p.range) {
    g.ranges_at = int(round_up(a.shared, 16));
    a.shared = g.ranges_at + (of == Of::query ? kRows : 2 * S) * int64_t(sizeof(SlotRange));
  }
  return a;
}

template <class M, class W, Of of>
void sum(const Device& device, const SoftmaxReadBackward& b, const float* terms) {
  constexpr int64_t kLeastTiles = 4, kBlocksPerSm = 2;  // as in stream_plan.h
  constexpr int S = kTile<Stored<M>, W, of>;
  const SoftmaxRead& p = b.forward;
  Layout a = lay_out<M, W, of>(b);
  Tiling& g = a.g;
  g.terms = terms;
  const int64_t batches = p.lead.batches(), units = batches * g.tiles * g.blocks;
  const int64_t wanted = div_up(device.sms * kBlocksPerSm, most(units, 1)), tiles = div_up(g.others, S);
  g.split_rows = div_up(tiles, most(1, least(wanted, tiles / kLeastTiles))) * S;
  g.splits = div_up(g.others, g.split_rows);
  const int64_t numbers = (of == Of::values ? p.V : p.K) + (of == Of::keys ? 1 : 0);
  if (g.splits > 1) g.partial = device.scratch<float>(g.splits * batches * g.rows * numbers);
  if (g.ranges_at != 0 && of != Of::query) {
    const int64_t spans = batches * tiles;
    auto* found = device.scratch<SlotRange>(spans);
    launch(device, "softmax_read_backward", find_spans, div_up(spans, kThreads), kThreads, 0, p, found, S);
    g.spans = found;
  }
  launch(device, "softmax_read_backward", sum_tiles<M, W, of>, units * g.splits, kThreads, a.shared, g);
  if (g.splits > 1) launch(device, "softmax_read_backward", add_ranges<of>, batches * g.rows, kThreads, 0, g);
}

template <class M, class W>
void sum_all(const Device& device, const SoftmaxReadBackward& b, const float* terms) {
  if (b.d_query) sum<M, W, Of::query>(device, b, terms);
  if (b.d_keys || b.d_mask) sum<M, W, Of::keys>(device, b, terms);
  if (b.d_values) sum<M, Stored<M>, Of::values>(device, b, terms);
}
// 16-bit keys; values of the same type, or float32.
template <class X>
void sum_16_bits(const Device& device, const SoftmaxReadBackward& b, const float* terms) {
  if (b.forward.values.dtype == b.forward.keys.dtype) sum_all<X, X>(device, b, terms);
  else sum_all<X, float>(device, b, terms);
}

}  // namespace

// Each has a source of its own, since its kernels take long to compile.
void sum_bf16(const Device&, const SoftmaxReadBackward&, const float* terms);
void sum_f16(const Device&, const SoftmaxReadBackward&, const float* terms);

}  // namespace mk::cuda
