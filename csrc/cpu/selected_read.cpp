// selected_read:  s[t, j] = scale <q_t, k_{i[t, j]}> + mask_{i[t, j]},   r_t = sum_j softmax_j(s[t, j]) v_{i[t, j]},
//                 lse_t = log sum_j exp(s[t, j])
//
// Tokens run in parallel. Rows of several tokens are one list, first of keys, then of values, so that prefetch runs on
// across tokens (cpu/tiles/gather.h); scores and weights never leave the cache. Every named row is read once per token:
// bound by the bandwidth of scattered rows. The gradient is that of topk_read (cpu/tiles/chosen_read.h) for the slots
// that may be addressed: those at a mask of -inf are no longer named, so that nothing reads their rows.
#include "params/selected_read.h"

#include <algorithm>

#include "cpu/tiles/chosen_read.h"
#include "cpu/tiles/chosen_tiles.h"
#include "cpu/tiles/search_gradient.h"

namespace mk::MK_ISA {
namespace {

// w = softmax of n scores in any order, padded to whole registers. Returns the log-sum-exp.
template <class F>
F softmax_entries(F* w, int64_t n) {
  constexpr int W = kLanes<F>;
  for (int64_t j = n; j < round_up(n, W); ++j) w[j] = -kInf<F>;
  Vec<F> best = fill<F>(-kInf<F>), total = fill<F>(0);
  for (int64_t j = 0; j < n; j += W) {
    const Vec<F> s = load<F>(w + j);
    best = s > best ? s : best;
  }
  F lanes[W], top = -kInf<F>;
  store<F>(lanes, best);
  for (F x : lanes) top = x > top ? x : top;
  if (std::isinf(top)) {  // no finite score: beside +inf others have weight 0, and its own weight is NaN
    const bool nan = std::any_of(w, w + n, [](F s) { return s != s; });
    const F none = std::numeric_limits<F>::quiet_NaN();
    for (int64_t j = 0; j < n; ++j) w[j] = nan || w[j] == kInf<F> ? none : F(0);
    return nan ? none : top;
  }
  for (int64_t j = 0; j < n; j += W) {
    const Vec<F> e = exp<F>(load<F>(w + j) - top);
    total += e;
    store<F>(w + j, e);
  }
  const F whole = sum<F>(total), inverse = F(1) / whole;
  for (int64_t j = 0; j < n; ++j) w[j] *= inverse;
  return top + std::log(whole);
}

template <class F>
struct Memory {
  RowList<F> keys, values;  // weights of keys: the scales of the rows
  F* mask;                  // of the rows of keys
  int64_t* ends;
  F *query, *scores, *row, *read;
  Memory(Arena& arena, const ChosenTiles& s, const SelectedRead& p)
      : keys(RowList<F>::take(arena, s.tile * p.choice.k)),
        values(RowList<F>::take(arena, s.tile * p.choice.k)),
        mask(arena.take<F>(s.tile * p.choice.k)),
        ends(arena.take<int64_t>(s.tile)),
        query(arena.take<F>(Slots<F>::padded(p.K))),
        scores(arena.take<F>(round_up(p.choice.k, kLanes<F>))),
        row(arena.take<F>(p.choice.k)),
        read(arena.take<F>(round_up(p.V, kLanes<F>))) {}
};

// The tokens [t0, t1) of one batch.
template <class F>
struct Tile {
  const SelectedRead& p;
  int64_t batch, t0, t1;
  Memory<F>& m;
  const SlotMask<F> mask{p.mask, p.choice.lead, batch};
  const TokenRows indices{p.choice.indices, p.choice.lead, batch, p.choice.T};

  const int64_t* index(int64_t t) const { return reinterpret_cast<const int64_t*>(indices.row(t)); }
  bool open(int64_t slot) const { return slot >= 0 && mask.at(slot) != -kInf<F>; }

  // Lists the rows of all tokens; those of token t end at ends[t - t0].
  void list() {
    const Lead& lead = p.choice.lead;
    const char *keys = p.keys.batch(lead, batch), *values = p.values.batch(lead, batch);
    const RowScale key_scale(p.keys, lead, batch), value_scale(p.values, lead, batch);
    for (int64_t t = t0; t < t1; ++t) {
      for (const int64_t *slot = index(t), *end = slot + p.choice.k; slot != end; ++slot) {
        if (!open(*slot)) continue;
        m.mask[m.keys.n] = mask.at(*slot);
        m.keys.push(keys + *slot * p.keys.row, key_scale.at<F>(*slot));
        m.values.push(values + *slot * p.values.row, value_scale.at<F>(*slot));
      }
      m.ends[t - t0] = m.keys.n;
    }
    m.keys.close(), m.values.close();
  }
  // Writes weights and lse, and multiplies the weights into the list of values.
  void weigh() {
    const Lead& lead = p.choice.lead;
    const TokenRows query(p.query, lead, batch, p.choice.T), weights(p.weights, lead, batch, p.choice.T);
    const TokenRows lse(p.lse, lead, batch, p.choice.T);
    for (int64_t t = t0, at = 0; t < t1; at = m.ends[t++ - t0]) {
      const int64_t n = m.ends[t - t0] - at;
      rows_query<F>(query, t, 1, p.K, F(p.scale), m.query);
      row_products(p.keys.dtype, m.keys.rows + at, n, p.K, m.query, m.scores);
      for (int64_t i = 0; i < n; ++i) m.scores[i] = m.scores[i] * m.keys.weights[at + i] + m.mask[at + i];
      *reinterpret_cast<F*>(lse.row(t)) = softmax_entries<F>(m.scores, n);
      for (int64_t i = 0; i < n; ++i) m.values.weights[at + i] *= m.scores[i];
      const int64_t* slot = index(t);
      for (int64_t j = 0, i = 0; j < p.choice.k; ++j) m.row[j] = open(slot[j]) ? m.scores[i++] : F(0);
      std::memcpy(weights.row(t), m.row, size_t(p.choice.k) * sizeof(F));
    }
  }
  void read() {
    const TokenRows read(p.read, p.choice.lead, batch, p.choice.T);
    for (int64_t t = t0, at = 0; t < t1; at = m.ends[t++ - t0]) {
      weighted_sum(p.values.dtype, m.values.rows + at, m.values.weights + at, m.ends[t - t0] - at, p.V, m.read);
      write_row<F>(m.read, p.V, read.dtype, read.row(t));
    }
  }
};

template <class F>
void forward(const SelectedRead& p) {
  const Choice& c = p.choice;
  const ChosenTiles tiles(c, p.K * size_of(p.keys.dtype) + p.V * size_of(p.values.dtype));
  Arena measure;
  Memory<F>(measure, tiles, p);
  parallel(tiles.tasks, measure.used(), [&](int64_t task, char* memory) {
    Arena arena(memory);
    Memory<F> m(arena, tiles, p);
    Tile<F> tile{p, tiles.batch(task), tiles.first(task), tiles.end(task), m};
    tile.list();
    tile.weigh();
    tile.read();
  });
}

// Indices [lead, T, k] with -1 in place of slots that may not be addressed.
template <class F>
class OpenChoice {
 public:
  OpenChoice(Choice c, const View& mask) : indices_(mask ? c.all_tokens() * c.k : 0), choice(c) {
    if (!mask) return;
    View& v = choice.indices;
    v.data = reinterpret_cast<char*>(indices_.data());
    v.row = c.k * int64_t(sizeof(int64_t));
    int64_t bytes = v.row * c.T;
    for (int d = c.lead.rank - 1; d >= 0; bytes *= c.lead.size[d--]) v.lead[d] = bytes;
    const int64_t tokens = c.tokens(), step = most(1, 16384 / most(c.k, 1));
    parallel(div_up(c.all_tokens(), step), 0, [&](int64_t task, char*) {
      const int64_t end = least(c.all_tokens(), (task + 1) * step);
      for (int64_t at = task * step; at < end; ++at) {
        const int64_t batch = at / tokens, t = at % tokens;
        const SlotMask<F> own(mask, c.lead, batch);
        const auto* from = reinterpret_cast<const int64_t*>(TokenRows(c.indices, c.lead, batch, c.T).row(t));
        auto* to = reinterpret_cast<int64_t*>(TokenRows(v, c.lead, batch, c.T).row(t));
        for (int64_t j = 0; j < c.k; ++j) to[j] = from[j] >= 0 && own.at(from[j]) == -kInf<F> ? -1 : from[j];
      }
    });
  }

 private:
  Buffer<int64_t> indices_;

 public:
  Choice choice;
};

template <class F>
void backward(const SelectedReadBackward& b) {
  const OpenChoice<F> open(b.read.search.choice, b.mask);
  TopkSearchBackward search = b.read.search;
  search.choice = open.choice;
  const TopkReadBackward& p = b.read;
  const Choice& c = search.choice;
  ChosenReadGradient<F> read(c, p.V, p.values, p.weights, p.d_read, p.d_weights, p.d_lse, p.d_values);
  Buffer<F> ds(c.all_tokens() * c.k);
  search_gradient(search, ds.data(), read.values(), read.bytes(),
                  [&](int64_t batch, int64_t t, F* d, Arena arena) { read.ds(batch, t, d, arena); });
}

}  // namespace

void selected_read(const SelectedRead& p) {
  if (p.query.dtype == DType::f64) forward<double>(p);
  else forward<float>(p);
}

void selected_read_backward(const SelectedReadBackward& p) {
  if (p.read.search.query.dtype == DType::f64) backward<double>(p);
  else backward<float>(p);
}

}  // namespace mk::MK_ISA
