// sparse_read:  r_t = sum_j w[t, j] v_{i[t, j]};   backward:  dw[t, j] = <v_{i[t, j]}, dr_t>,  dv_i = sum_{i[t, j] = i}
// w[t, j] dr_t
//
// Tokens run in parallel, lanes along the value width; the sum of a token stays in registers while its rows come in,
// several at a time (cpu/tiles/gather.h). Every chosen row is read once: bound by bandwidth of scattered rows. dv is a
// segmented sum over the entries sorted by slot (cpu/tiles/segments.h).
#include "params/sparse_read.h"

#include "cpu/tiles/segments.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t kTileBytes = 1 << 18;  // of chosen rows per task

// Token ranges of one batch that tasks take.
struct Tiles {
  int64_t tokens, tile, tiles, tasks;
  explicit Tiles(const Choice& c, int64_t bytes) : tokens(c.tokens()) {
    tile = most(1, least(tokens, kTileBytes / most(1, c.k * bytes)));
    tiles = div_up(tokens, tile);
    tasks = c.lead.batches() * tiles;
  }
};

// The chosen rows of tokens [t0, t1): list; ends[t - t0] is where token t ends in it. Index -1 is left out.
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

template <class F>
void forward(const SparseRead& p) {
  const Choice& c = p.choice;
  const Tiles tiles(c, p.V * size_of(p.values.dtype));
  struct Memory {
    RowList<F> list;
    int64_t* ends;
    F *weights, *row;
    Memory(Arena& arena, const Tiles& s, int64_t k, int64_t V)
        : list(RowList<F>::take(arena, s.tile * k)),
          ends(arena.take<int64_t>(s.tile)),
          weights(arena.take<F>(k)),
          row(arena.take<F>(round_up(V, kLanes<F>))) {}
  };
  Arena measure;
  Memory(measure, tiles, c.k, p.V);
  parallel(tiles.tasks, measure.used(), [&](int64_t task, char* memory) {
    Arena arena(memory);
    Memory m(arena, tiles, c.k, p.V);
    const int64_t batch = task / tiles.tiles, t0 = task % tiles.tiles * tiles.tile;
    const int64_t t1 = least(t0 + tiles.tile, tiles.tokens);
    list_rows<F>(p, batch, t0, t1, m.list, m.ends, m.weights);
    const TokenRows read(p.read, c.lead, batch, c.T);
    for (int64_t t = t0, j = 0; t < t1; j = m.ends[t++ - t0]) {
      weighted_sum(p.values.dtype, m.list.rows + j, m.list.weights + j, m.ends[t - t0] - j, p.V, m.row);
      write_row<F>(m.row, p.V, read.dtype, read.row(t));
    }
  });
}

template <class F>
void gradient_of_weights(const SparseReadBackward& b) {
  const SparseRead& p = b.forward;
  const Choice& c = p.choice;
  const Tiles tiles(c, p.V * size_of(p.values.dtype));
  const int64_t VP = round_up(p.V, kLanes<F>);
  struct Memory {
    RowList<F> list;
    int64_t* ends;
    F *weights, *row, *products;
    Memory(Arena& arena, const Tiles& s, int64_t k, int64_t VP)
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
    const int64_t batch = task / tiles.tiles, t0 = task % tiles.tiles * tiles.tile;
    const int64_t t1 = least(t0 + tiles.tile, tiles.tokens);
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

void sparse_read(const SparseRead& p) {
  if (p.weights.dtype == DType::f64) forward<double>(p);
  else forward<float>(p);
}

void sparse_read_backward(const SparseReadBackward& p) {
  if (p.forward.weights.dtype == DType::f64) backward<double>(p);
  else backward<float>(p);
}

}  // namespace mk::MK_ISA
