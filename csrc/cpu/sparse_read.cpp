// sparse_read:  r_t = sum_j w[t, j] v_{i[t, j]}
// backward:     dw[t, j] = <v_{i[t, j]}, dr_t>,  dv_i = sum_{i[t, j] = i} w[t, j] dr_t
//
// Tokens run in parallel, lanes along the value width. The sum of a token stays in registers while its rows are loaded,
// several at a time (cpu/tiles/gather.h): from a list of pointers, prefetched, or in place where a cache holds them.
// Every chosen row is read once: bound by the bandwidth of scattered rows. dv is a segmented sum over the entries
// sorted by slot (cpu/tiles/segments.h).
#include "params/sparse_read.h"

#include <atomic>

#include "cpu/tiles/chosen_tiles.h"
#include "cpu/tiles/indices.h"
#include "cpu/tiles/streaming.h"

namespace mk::MK_ISA {
namespace {

// Lists the chosen rows of tokens [t0, t1); the rows of token t end at ends[t - t0]. Index -1 is left out.
template <class F>
void list_rows(const SparseRead& p, int64_t batch, int64_t t0, int64_t t1, RowList<F>& list, int64_t* ends,
               F* weights) {
  const TokenRows indices(p.choice.indices, p.choice.lead, batch, p.choice.T);
  const TokenRows w(p.weights, p.choice.lead, batch, p.choice.T);
  const char* values = p.values.batch(p.choice.lead, batch);
  const RowScale scale(p.values, p.choice.lead, batch);
  for (int64_t t = t0; t < t1; ++t) {
    const auto* index = reinterpret_cast<const int64_t*>(indices.row(t));
    const F* x = row_as<F>(w.row(t), w.dtype, p.choice.k, weights);
    for (int64_t j = 0; j < p.choice.k; ++j) {
      if (index[j] >= 0) list.push(values + index[j] * p.values.row, x[j] * scale.at<F>(index[j]));
    }
    ends[t - t0] = list.n;
  }
  list.close();
}

// Reads rows that a cache holds: many tokens at once where their numbers lie one after the other, as do the results.
template <class F>
void read_near(const SparseRead& p, int64_t batch, int64_t t0, int64_t t1, const TokenRows& read, F* weights, F* row) {
  const Choice& c = p.choice;
  const TokenRows indices(c.indices, c.lead, batch, c.T), given(p.weights, c.lead, batch, c.T);
  const int64_t item = int64_t(sizeof(F)), number = int64_t(sizeof(int64_t));
  const bool adjacent = indices.folds + given.folds + read.folds == 0 && indices.stride == c.k * number &&
                        given.dtype == kOwn<F> && given.stride == c.k * item && read.dtype == kOwn<F> &&
                        read.stride == p.V * item && p.V % kLanes<F> == 0;
  NamedRows rows{p.values.dtype, p.values.batch(c.lead, batch), p.values.row, adjacent ? t1 - t0 : 1, c.k, nullptr};
  for (int64_t t = t0; t < t1; t += rows.tokens) {
    rows.index = reinterpret_cast<const int64_t*>(indices.row(t));
    const F* w = row_as<F>(given.row(t), given.dtype, c.k, weights);
    weighted_sums(rows, w, p.V, adjacent ? reinterpret_cast<F*>(read.row(t)) : row);
    if (!adjacent) write_row<F>(row, p.V, read.dtype, read.row(t));
  }
}

template <class F>
int64_t forward(const SparseRead& p) {
  const Choice& c = p.choice;
  const ChosenTiles tiles(c, p.V * size_of(p.values.dtype));
  struct Memory {
    RowList<F> list;
    int64_t* ends;
    F *weights, *row;
    Memory(Arena& arena, const ChosenTiles& s, int64_t k, int64_t V)
        : list(RowList<F>::take(arena, s.tile * k)),
          ends(arena.take<int64_t>(s.tile)),
          weights(arena.take<F>(k)),
          row(arena.take<F>(round_up(V, kLanes<F>))) {}
  };
  // Rows that a cache holds need no list.
  const bool near = !p.values.scale && c.lead.batches() * c.N * p.V * size_of(p.values.dtype) < kFarBytes;
  std::atomic<int64_t> wrong{-1};
  Arena measure;
  Memory(measure, tiles, c.k, p.V);
  parallel(tiles.tasks, measure.used(), [&](int64_t task, char* memory) {
    Arena arena(memory);
    Memory m(arena, tiles, c.k, p.V);
    const int64_t batch = tiles.batch(task), t0 = tiles.first(task), t1 = tiles.end(task);
    const int64_t found = wrong_among(c, batch * tiles.tokens + t0, batch * tiles.tokens + t1);
    if (found != -1) return wrong.store(found, std::memory_order_relaxed);
    const TokenRows read(p.read, c.lead, batch, c.T);
    if (near) return read_near(p, batch, t0, t1, read, m.weights, m.row);
    list_rows<F>(p, batch, t0, t1, m.list, m.ends, m.weights);
    for (int64_t t = t0, j = 0; t < t1; j = m.ends[t++ - t0]) {
      weighted_sum(p.values.dtype, m.list.rows + j, m.list.weights + j, m.ends[t - t0] - j, p.V, m.row);
      write_row<F>(m.row, p.V, read.dtype, read.row(t));
    }
  });
  return wrong.load();
}

template <class F>
void gradient_of_weights(const SparseReadBackward& b) {
  const SparseRead& p = b.forward;
  const Choice& c = p.choice;
  const ChosenTiles tiles(c, p.V * size_of(p.values.dtype));
  const int64_t VP = round_up(p.V, kLanes<F>);
  struct Memory {
    RowList<F> list;
    int64_t* ends;
    F *weights, *row, *products;
    Memory(Arena& arena, const ChosenTiles& s, int64_t k, int64_t VP)
        : list(RowList<F>::take(arena, s.tile * k)),
          ends(arena.take<int64_t>(s.tile)),
          weights(arena.take<F>(k)),
          row(arena.take<F>(VP)),
          products(arena.take<F>(k)) {}
  };
  Arena measure;
  Memory(measure, tiles, c.k, VP);
  parallel(tiles.tasks, measure.used(), [&](int64_t task, char* memory) {
    Arena arena(memory);
    Memory m(arena, tiles, c.k, VP);
    const int64_t batch = tiles.batch(task), t0 = tiles.first(task), t1 = tiles.end(task);
    list_rows<F>(p, batch, t0, t1, m.list, m.ends, m.weights);
    const TokenRows indices(c.indices, c.lead, batch, c.T), d_read(b.d_read, c.lead, batch, c.T);
    const TokenRows d_weights(b.d_weights, c.lead, batch, c.T);
    const RowScale scale(p.values, c.lead, batch);
    for (int64_t v = p.V; v < VP; ++v) m.row[v] = 0;
    for (int64_t t = t0, j = 0; t < t1; j = m.ends[t++ - t0]) {
      read_row<F>(d_read.row(t), d_read.dtype, p.V, m.row);
      row_products(p.values.dtype, m.list.rows + j, m.ends[t - t0] - j, p.V, m.row, m.products);
      const auto* index = reinterpret_cast<const int64_t*>(indices.row(t));
      const F* product = m.products;
      for (int64_t i = 0; i < c.k; ++i) m.weights[i] = index[i] >= 0 ? *product++ * scale.at<F>(index[i]) : F(0);
      write_row<F>(m.weights, c.k, d_weights.dtype, d_weights.row(t));
    }
  });
}

template <class F>
void gradient_of_values(const SparseReadBackward& b) {
  const SparseRead& p = b.forward;
  const Choice& c = p.choice;
  const int64_t tokens = c.tokens(), step = most(1, 16384 / most(c.k, 1));
  Buffer<F> weights(c.all_tokens() * c.k);
  parallel(div_up(c.all_tokens(), step), 0, [&](int64_t task, char*) {
    const int64_t end = least(c.all_tokens(), (task + 1) * step);
    for (int64_t t = task * step; t < end; ++t) {
      const TokenRows w(p.weights, c.lead, t / tokens, c.T);
      read_row<F>(w.row(t % tokens), w.dtype, c.k, weights.data() + t * c.k);
    }
  });
  TokenPointers rows(b.d_read, c.lead, c.T);
  const Sum<F> sum{b.d_values, p.V, weights.data(), F(1), rows.data(), b.d_read.dtype};
  sum_chosen(c, &sum, 1);
}

template <class F>
void backward(const SparseReadBackward& b) {
  if (b.d_weights) gradient_of_weights<F>(b);
  if (b.d_values) gradient_of_values<F>(b);
}

}  // namespace

int64_t sparse_read(const SparseRead& p) {
  return p.weights.dtype == DType::f64 ? forward<double>(p) : forward<float>(p);
}

void sparse_read_backward(const SparseReadBackward& p) {
  if (p.forward.weights.dtype == DType::f64) backward<double>(p);
  else backward<float>(p);
}

}  // namespace mk::MK_ISA
