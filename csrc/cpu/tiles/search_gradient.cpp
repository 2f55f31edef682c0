// Tokens run in parallel and gather; then the chosen rows are summed slot by slot (cpu/tiles/segments.cpp).
#include "cpu/tiles/search_gradient.h"

namespace mk::MK_ISA {
namespace {

template <class F>
void run(const TopkSearchBackward& p, F* ds, const Sum<F>& extra, size_t bytes, ScoreGradient<F> score_gradient) {
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
      F* d = ds + at * c.k;
      score_gradient(batch, t, d, arena);
      if (!p.d_query) continue;
      const auto* index = reinterpret_cast<const int64_t*>(TokenRows(c.indices, c.lead, batch, c.T).row(t));
      const char* keys = p.keys.batch(c.lead, batch);
      const RowScale key_scale(p.keys, c.lead, batch);
      for (int64_t j = 0; j < c.k; ++j) {
        if (index[j] >= 0) list.push(keys + index[j] * p.keys.row, d[j] * F(p.scale) * key_scale.at<F>(index[j]));
      }
      list.close();
      weighted_sum(p.keys.dtype, list.rows, list.weights, list.n, p.K, row);
      write_row<F>(row, p.K, p.d_query.dtype, TokenRows(p.d_query, c.lead, batch, c.T).row(t));
    }
  });
  TokenPointers queries(p.d_keys ? p.query : View{}, c.lead, c.T);
  const Sum<F> sums[] = {
      {p.d_keys, p.K, ds, F(p.scale), queries.data(), p.query.dtype},
      {p.d_mask, 1, ds, F(1), nullptr, DType::f32},
      extra,
  };
  sum_chosen(c, sums, 3);
}

}  // namespace

void search_gradient(const TopkSearchBackward& p, float* ds, const Sum<float>& extra, size_t bytes,
                     ScoreGradient<float> score_gradient) {
  run(p, ds, extra, bytes, score_gradient);
}
void search_gradient(const TopkSearchBackward& p, double* ds, const Sum<double>& extra, size_t bytes,
                     ScoreGradient<double> score_gradient) {
  run(p, ds, extra, bytes, score_gradient);
}

}  // namespace mk::MK_ISA
