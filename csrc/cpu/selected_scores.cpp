// selected_scores:  s[t, j] = scale <q_t, k_{i[t, j]}>
//
// Tokens run in parallel; the rows of several tokens are one list, so that prefetch runs on across them
// (cpu/tiles/gather.h). Every chosen row is read once: bound by the bandwidth of scattered rows. The gradient is that
// of topk_search.
#include "params/selected_scores.h"

#include "cpu/tiles/chosen_tiles.h"

namespace mk::MK_ISA {
namespace {

template <class F>
struct Memory {
  RowList<F> list;  // weights: the scales of the rows
  int64_t* ends;
  F *query, *products, *row;
  Memory(Arena& arena, const ChosenTiles& s, int64_t k, int64_t K)
      : list(RowList<F>::take(arena, s.tile * k)),
        ends(arena.take<int64_t>(s.tile)),
        query(arena.take<F>(Slots<F>::padded(K))),
        products(arena.take<F>(k)),
        row(arena.take<F>(k)) {}
};

template <class F>
void forward(const SelectedScores& p) {
  const Choice& c = p.choice;
  const ChosenTiles tiles(c, p.K * size_of(p.keys.dtype));
  Arena measure;
  Memory<F>(measure, tiles, c.k, p.K);
  parallel(tiles.tasks, measure.used(), [&](int64_t task, char* memory) {
    Arena arena(memory);
    Memory<F> m(arena, tiles, c.k, p.K);
    const int64_t batch = tiles.batch(task), t0 = tiles.first(task), t1 = tiles.end(task);
    const TokenRows indices(c.indices, c.lead, batch, c.T), query(p.query, c.lead, batch, c.T);
    const TokenRows scores(p.scores, c.lead, batch, c.T);
    const char* keys = p.keys.batch(c.lead, batch);
    const RowScale scale(p.keys, c.lead, batch);
    for (int64_t t = t0; t < t1; ++t) {
      const auto* index = reinterpret_cast<const int64_t*>(indices.row(t));
      for (int64_t j = 0; j < c.k; ++j) {
        if (index[j] >= 0) m.list.push(keys + index[j] * p.keys.row, scale.at<F>(index[j]));
      }
      m.ends[t - t0] = m.list.n;
    }
    m.list.close();
    for (int64_t t = t0, at = 0; t < t1; at = m.ends[t++ - t0]) {
      rows_query<F>(query, t, 1, p.K, F(p.scale), m.query);
      row_products(p.keys.dtype, m.list.rows + at, m.ends[t - t0] - at, p.K, m.query, m.products);
      const auto* index = reinterpret_cast<const int64_t*>(indices.row(t));
      for (int64_t j = 0, i = 0; j < c.k; ++j) {
        const bool named = index[j] >= 0;
        m.row[j] = named ? m.products[i] * m.list.weights[at + i] : -kInf<F>;
        i += named;
      }
      write_row<F>(m.row, c.k, scores.dtype, scores.row(t));
    }
  });
}

}  // namespace

void selected_scores(const SelectedScores& p) {
  if (p.query.dtype == DType::f64) forward<double>(p);
  else forward<float>(p);
}

}  // namespace mk::MK_ISA
