// How the passes of write_gradient_tiles.h are launched.
#pragma once

#include "cuda/tiles/write_gradient_tiles.h"

namespace mk::cuda {
namespace {

// One block per row of the result: adds up the ranges in order.
template <bool by_slots>
MK_KERNEL(kThreads)
add_ranges(MK_PARAM(Tiling) r) {
  const Pairs& p = r.w.pairs;
  const int64_t at = blockIdx.x, all = p.lead.batches() * r.rows, batch = at / r.rows, row = at % r.rows;
  auto sum = [&](const float* from, int64_t step) {
    float x = 0;
    for (int64_t i = 0; i < r.splits; ++i) x += from[i * step];
    return x;
  };
  const View& result = r.result;
  if (r.width > 0 && result) {
    char* base = result.batch(p.lead, batch);
    auto* out =
        reinterpret_cast<float*>(by_slots ? base + row * result.row : token_row(result, p.lead, base, p.T, row));
    for (int64_t c = threadIdx.x; c < r.width; c += kThreads) out[c] = sum(r.partial + at * r.width + c, all * r.width);
  }
  if (threadIdx.x != 0) return;
  const float* sums = r.partial + r.splits * all * r.width + at;
  if (r.of == Of::deltas) r.new_deltas[at] = sum(sums, all);
  if (r.of == Of::keys && r.d_mask) {
    *reinterpret_cast<float*>(r.d_mask.batch(p.lead, batch) + row * r.d_mask.row) = sum(sums, all);
  }
}

template <class M, bool by_slots>
void sum(const Device& device, const char* name, Tiling& r) {
  using X = Stored<M>;
  constexpr int S = kOthers<X>;
  constexpr int64_t kLeastTiles = 4, kBlocksPerSm = 2;  // as for streams

  const Pairs& p = r.w.pairs;
  const int64_t all = p.lead.batches() * r.rows;
  r.tiles = div_up(r.rows, kRows);
  r.key_parts = int(most(1, div_up(p.K, kColumns))), r.value_parts = int(most(1, div_up(p.V, kColumns)));
  r.key_step = tile_pitch<X>(least(p.K, kColumns)), r.value_step = tile_pitch<X>(least(p.V, kColumns));
  r.gate_step = tile_pitch<X>(by_slots ? kRows : S);
  const int64_t step = most(r.key_step, r.value_step), item = int64_t(sizeof(X));
  const int64_t key_pitch = round_up(p.K, 16) * item + 16, value_pitch = round_up(p.V, 16) * item + 16;
  auto shared = [&](bool held) {
    const int64_t gates = p.weights ? (by_slots ? S : kRows) * int64_t(r.gate_step) : 0;
    r.buffer_bytes = int(most((held ? S : S + kRows) * step, gates));
    return int64_t(sizeof(Shared<S, by_slots>)) + kBuffers * int64_t(r.buffer_bytes) +
           (held ? kRows * (key_pitch + value_pitch) : 0);
  };
  r.held = shared(true) <= device.shared;
  r.key_pitch = r.held ? int(key_pitch) : 0, r.value_pitch = r.held ? int(value_pitch) : 0;
  const int64_t units = p.lead.batches() * r.tiles * r.blocks;
  const int64_t wanted = div_up(device.sms * kBlocksPerSm, most(units, 1)), tiles = div_up(r.others, S);
  r.split_rows = most(1, div_up(tiles, most(1, least(wanted, tiles / kLeastTiles)))) * S;
  r.splits = most(1, div_up(r.others, r.split_rows));
  const bool merged = r.splits > 1 && r.of != Of::maps && r.of != Of::weights;
  if (merged) r.partial = device.scratch<float>(r.splits * all * (r.width + 1));
  launch(device, name, sum_tiles<M, by_slots>, units * r.splits, kThreads, shared(r.held), r);
  if (merged) launch(device, name, add_ranges<by_slots>, all, kThreads, 0, r);
}

template <bool by_slots>
void sum_by(const Device& device, const char* name, const Gradients& g, Of of, float* deltas) {
  const Pairs& p = g.w.pairs;
  const View keys = p.weights ? View{} : p.keys;
  Tiling r{};
  r.w = g.w, r.of = of, r.deltas = g.deltas, r.new_deltas = deltas;
  r.lefts = g.lefts, r.shares = g.shares, r.firsts = g.firsts, r.tokens = g.tokens, r.borders = g.borders;
  r.retained = g.retained, r.d_retained = g.d_retained, r.d_mask = g.d_mask;
  r.result = of == Of::keys      ? g.d_keys
             : of == Of::query   ? g.d_query
             : of == Of::write   ? g.d_write
             : of == Of::weights ? g.d_weights
                                 : View{};
  r.views = views_of(g.w);
  r.views.of[kUpper] = g.d_out, r.views.of[kRetained] = g.retained, r.views.of[kDRetained] = g.d_retained;
  r.rows = by_slots ? p.N : g.tokens, r.others = by_slots ? g.tokens : p.N;
  const Rows q = rows_of(r.views, kQuery, p.lead, p.K), k = rows_of(r.views, kKeys, p.lead, p.K);
  const Rows x = rows_of(r.views, kWrite, p.lead, p.V), u = rows_of(r.views, kUpper, p.lead, p.V);
  r.own_keyed = by_slots ? k : q, r.keyed = by_slots ? q : k, r.own_valued = by_slots ? u : x;
  r.valued = by_slots ? x : u, r.gates = rows_of(r.views, kQuery, p.lead, p.N);
  r.width = of == Of::write ? p.V : (of == Of::keys && g.d_keys) || of == Of::query ? p.K : 0;
  r.blocks = int(most(1, div_up(r.width, kColumns)));
  with_arithmetic(device, g.w, {&p.query, &keys, &g.w.write, &g.d_out, &p.weights},
                  [&]<class M>() { sum<M, by_slots>(device, name, r); });
}

}  // namespace
}  // namespace mk::cuda
