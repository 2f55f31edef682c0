// indexer_search:  the k largest of s[t, i] = sum_h w[t, h] relu(x[t, h, i]) + mask_i,  x[t, h, i] = scale <q_th, k_i>,
// exactly, in order, ties to the smaller index. The search is that of topk_search with scores that are summed over
// heads (cpu/tiles/search.h, cpu/tiles/head_scores.h).
//
// backward, of the chosen slots i = i[t, j], with g[t, h, j] = ds[t, j] w[t, h] where x[t, h, i] > 0, else 0:
//   dw[t, h] = sum_j ds[t, j] relu(x[t, h, i]),   dq_th = scale sum_j g[t, h, j] k_i
//   dk_i = scale sum_{t, h, j: i[t, j] = i} g[t, h, j] q_th,   dmask_i = sum_{t, j: i[t, j] = i} ds[t, j]
//
// Tokens run in parallel for dw and dq. dk is a sum over the entries sorted by slot (cpu/tiles/segments.h), each with a
// term per head. It multiplies again, because T k H numbers g would be more memory than all other arguments together.
#include "params/indexer_search.h"

#include "cpu/tiles/head_scores.h"
#include "cpu/tiles/search.h"
#include "cpu/tiles/segments.h"

namespace mk::MK_ISA {
namespace {

template <class F>
void forward(const IndexerSearch& p) {
  const TopkSearch& s = p.search;
  search(
      s, size_t(s.k) * sizeof(F) + 64,
      [&](int64_t batch, int64_t t, const F* scores, const int64_t* slots, int64_t n, Arena arena) {
        F* row = arena.take<F>(s.k);
        auto* index = reinterpret_cast<int64_t*>(TokenRows(s.indices, s.lead, batch, s.T).row(t));
        for (int64_t j = 0; j < s.k; ++j) {
          row[j] = j < n ? scores[j] : -kInf<F>;
          index[j] = j < n ? slots[j] : -1;
        }
        write_row<F>(row, s.k, s.scores.dtype, TokenRows(s.scores, s.lead, batch, s.T).row(t));
      },
      nullptr, &p.heads);
}

// Everything that belongs to one token.
template <class F>
struct Token {
  const IndexerSearchBackward& p;
  int64_t batch, t;
  const Choice& c = p.search.choice;

  const int64_t* indices() const {
    return reinterpret_cast<const int64_t*>(TokenRows(c.indices, c.lead, batch, c.T).row(t));
  }
  const char* query(int64_t h) const {
    return TokenRows(p.search.query, c.lead, batch, c.T).row(t) + h * p.heads.stride;
  }
  void weights(F* w) const {
    read_row<F>(TokenRows(p.heads.weights, c.lead, batch, c.T).row(t), p.heads.weights.dtype, p.heads.H, w);
  }
  const char* key(int64_t slot) const { return p.search.keys.batch(c.lead, batch) + slot * p.search.keys.row; }
};

template <class F>
struct Memory {
  RowList<F> list;  // weights: g of one head
  F *d, *x, *query, *row, *w, *dw;
  Memory(Arena& arena, const IndexerSearchBackward& p)
      : list(RowList<F>::take(arena, p.search.choice.k)),
        d(arena.take<F>(p.search.choice.k)),
        x(arena.take<F>(p.search.choice.k)),
        query(arena.take<F>(Slots<F>::padded(p.search.K))),
        row(arena.take<F>(Slots<F>::padded(p.search.K))),
        w(arena.take<F>(p.heads.H)),
        dw(arena.take<F>(p.heads.H)) {}
};

// dq and dw of one token. `ds`: of its entries.
template <class F>
void token_gradients(const Token<F>& token, const F* ds, Memory<F>& m) {
  const IndexerSearchBackward& p = token.p;
  const Choice& c = token.c;
  const TopkSearchBackward& s = p.search;
  const int64_t* index = token.indices();
  for (int64_t j = 0; j < c.k; ++j) {
    if (index[j] >= 0) m.d[m.list.n] = ds[j], m.list.push(token.key(index[j]), F(0));
  }
  m.list.close();
  const int64_t n = m.list.n;
  token.weights(m.w);
  for (int64_t h = 0; h < p.heads.H; ++h) {
    read_row<F>(token.query(h), s.query.dtype, s.K, m.query);
    for (int64_t i = 0; i < s.K; ++i) m.query[i] *= F(s.scale);
    for (int64_t i = s.K; i < Slots<F>::padded(s.K); ++i) m.query[i] = 0;
    row_products(s.keys.dtype, m.list.rows, n, s.K, m.query, m.x);
    F sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += m.d[i] * (m.x[i] <= 0 ? F(0) : m.x[i]);
    m.dw[h] = sum;
    if (!s.d_query) continue;
    for (int64_t i = 0; i < n; ++i) m.list.weights[i] = m.x[i] <= 0 ? F(0) : F(s.scale) * m.d[i] * m.w[h];
    weighted_sum(s.keys.dtype, m.list.rows, m.list.weights, n, s.K, m.row);
    char* out = TokenRows(s.d_query, c.lead, token.batch, c.T).row(token.t) + h * p.d_stride;
    write_row<F>(m.row, s.K, s.d_query.dtype, out);
  }
  if (!p.d_weights) return;
  write_row<F>(m.dw, p.heads.H, p.d_weights.dtype, TokenRows(p.d_weights, c.lead, token.batch, c.T).row(token.t));
}

template <class F>
void backward(const IndexerSearchBackward& p) {
  const TopkSearchBackward& s = p.search;
  const Choice& c = s.choice;
  const int64_t tokens = c.tokens(), all = c.all_tokens(), H = p.heads.H, width = Slots<F>::padded(s.K);
  Buffer<F> ds(all * c.k);
  Arena measure;
  Memory<F>(measure, p);
  parallel(all, measure.used(), [&](int64_t at, char* memory) {
    const Token<F> token{p, at / tokens, at % tokens};
    F* d = ds.data() + at * c.k;
    read_row<F>(TokenRows(s.d_scores, c.lead, token.batch, c.T).row(token.t), s.d_scores.dtype, c.k, d);
    for (int64_t j = 0; j < c.k; ++j) d[j] = token.indices()[j] < 0 ? F(0) : d[j];
    if (!s.d_query && !p.d_weights) return;
    Arena arena(memory);
    Memory<F> m(arena, p);
    token_gradients(token, d, m);
  });
  const auto add = [&](int64_t entry, RowList<F>& list, F* memory) {
    const Token<F> token{p, entry / c.k / tokens, entry / c.k % tokens};
    F *key = memory, *w = memory + width, *x = w + H;
    read_row<F>(token.key(token.indices()[entry % c.k]), s.keys.dtype, s.K, key);
    for (int64_t i = s.K; i < width; ++i) key[i] = 0;
    const int64_t first = list.n;
    for (int64_t h = 0; h < H; ++h) list.push(token.query(h), F(0));
    list.close();
    row_products(s.query.dtype, list.rows + first, H, s.K, key, x);
    token.weights(w);
    for (int64_t h = 0; h < H; ++h) {
      list.weights[first + h] = F(s.scale) * x[h] <= 0 ? F(0) : ds.data()[entry] * w[h];
    }
  };
  const Terms<F> terms{H, width + 2 * H, add};
  const Sum<F> sums[] = {
      {s.d_keys, s.K, nullptr, F(s.scale), nullptr, s.query.dtype, &terms},
      {s.d_mask, 1, ds.data(), F(1), nullptr, DType::f32},
  };
  sum_chosen(c, sums, 2);
}

}  // namespace

void indexer_search(const IndexerSearch& p) {
  if (p.search.query.dtype == DType::f64) forward<double>(p);
  else forward<float>(p);
}

void indexer_search_backward(const IndexerSearchBackward& p) {
  if (p.search.query.dtype == DType::f64) backward<double>(p);
  else backward<float>(p);
}

}  // namespace mk::MK_ISA
