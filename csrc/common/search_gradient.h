// Gradients of the scores of chosen slots, ds[t, j] of s = scale <q_t, k_{i[t, j]}> + mask_{i[t, j]}:
//   dq_t = scale sum_j ds[t, j] k_{i[t, j]}
//   dk_i = scale sum_{i[t, j] = i} ds[t, j] q_t,   dmask_i = sum_{i[t, j] = i} ds[t, j]
// Tokens run in parallel and gather; then the chosen rows are summed slot by slot (common/segments.h).
#pragma once

#include "common/segments.h"
#include "cpu/topk_search.h"

namespace mk::MK_ISA {

// score_gradient(batch, token, ds, arena) writes ds[0..k), 0 where the index is -1. `extra` is summed beside the
// gradients here.
template <class F, class ScoreGradient>
void search_gradient(const TopkSearchBackward& p, Buffer<F>& ds, const Sum<F>& extra, size_t bytes,
                     ScoreGradient&& score_gradient) {
  const Choice& c = p.choice;
  const int64_t tokens = c.tokens(), step = most(1, 4096 / most(c.k, 1));
  auto memory_of = [&](Arena& arena, RowList<F>& list, F*& row) {
    list = RowList<F>::take(arena, c.k);
    row = arena.take<F>(round_up(p.K, kLanes<F>));
  };
  Arena measure;
  RowList<F> none;
  F* nowhere;
  memory_of(measure, none, nowhere);
  parallel(div_up(c.all_tokens(), step), measure.used() + bytes, [&](int64_t task, char* memory) {
    const int64_t end = least(c.all_tokens(), (task + 1) * step);
    for (int64_t at = task * step; at < end; ++at) {
      Arena arena(memory);
      RowList<F> list;
      F* row;
      memory_of(arena, list, row);
      const int64_t batch = at / tokens, t = at % tokens;
      F* d = ds.data() + at * c.k;
      score_gradient(batch, t, d, arena);
      if (!p.d_query) continue;
      const auto* index = reinterpret_cast<const int64_t*>(TokenRows(c.indices, c.lead, batch, c.T).row(t));
      const char* keys = p.keys.batch(c.lead, batch);
      for (int64_t j = 0; j < c.k; ++j) {
        if (index[j] >= 0) list.push(keys + index[j] * p.keys.row, d[j] * F(p.scale));
      }
      list.close();
      with_dtype<F>(p.keys.dtype, [&]<DType D>() { weighted_sum<F, D>(list.rows, list.weights, list.n, p.K, row); });
      write_row<F>(row, p.K, p.d_query.dtype, TokenRows(p.d_query, c.lead, batch, c.T).row(t));
    }
  });
  TokenPointers queries(p.d_keys ? p.query : View{}, c.lead, c.T);
  const Sum<F> sums[] = {
      {p.d_keys, p.K, ds.data(), F(p.scale), queries.data(), p.query.dtype},
      {p.d_mask, 1, ds.data(), F(1), nullptr, DType::f32},
      extra,
  };
  sum_chosen<F>(c, sums, 3);
}

}  // namespace mk::MK_ISA
