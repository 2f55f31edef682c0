// topk_read:  p[t, j] = softmax_j(s[t, i_j]) over the k best slots i_j,   r_t = sum_j p[t, j] v_{i_j}
// backward:   dp[t, j] = <dr_t, v_{i_j}> + d_weights[t, j],   ds = p (dp - sum_j p dp),   dv_i = sum_{i_j = i} p[t, j]
// dr_t
//
// A token is finished where its search ends: scores never leave float32, weights and rows are used while they are at
// hand. The read is k rows against N keys, so the cost is that of the search (common/search.h). The backward works from
// indices and weights alone and touches only chosen rows (common/search_gradient.h).
#include "cpu/topk_read.h"

#include "common/search.h"
#include "common/search_gradient.h"

namespace mk::MK_ISA {
namespace {

// w = softmax of scores in descending order, padded to whole registers. A NaN among them is the first.
template <class F>
void softmax_row(F* w, int64_t n) {
  constexpr int W = kLanes<F>;
  for (int64_t j = n; j < round_up(n, W); ++j) w[j] = -kInf<F>;
  const F top = n > 0 ? w[0] : F(0);
  Vec<F> total = fill<F>(0);
  for (int64_t j = 0; j < n; j += W) {
    const Vec<F> e = exp2<F>((load<F>(w + j) - top) * F(kLog2e));
    total += e;
    store<F>(w + j, e);
  }
  if (std::isinf(top)) return;  // finite scores have weight 0 beside an infinite one, which has no weight
  const F inverse = F(1) / sum<F>(total);
  for (int64_t j = 0; j < n; ++j) w[j] *= inverse;
}

template <class F>
void forward(const TopkRead& p) {
  const TopkSearch& s = p.search;
  struct Memory {
    RowList<F> list;
    F *weights, *read;
    Memory(Arena& arena, int64_t k, int64_t V)
        : list(RowList<F>::take(arena, k)),
          weights(arena.take<F>(round_up(k, kLanes<F>))),
          read(arena.take<F>(round_up(V, kLanes<F>))) {}
  };
  Arena measure;
  Memory(measure, s.k, p.V);
  search(s, measure.used(),
         [&](int64_t batch, int64_t t, const F* scores, const int64_t* slots, int64_t n, Arena arena) {
           Memory m(arena, s.k, p.V);
           auto* index = reinterpret_cast<int64_t*>(TokenRows(s.indices, s.lead, batch, s.T).row(t));
           for (int64_t j = 0; j < n; ++j) m.weights[j] = scores[j], index[j] = slots[j];
           softmax_row<F>(m.weights, n);
           const char* values = p.values.batch(s.lead, batch);
           for (int64_t j = 0; j < n; ++j) m.list.push(values + index[j] * p.values.row, m.weights[j]);
           for (int64_t j = n; j < s.k; ++j) m.weights[j] = 0, index[j] = -1;
           m.list.close();
           std::memcpy(TokenRows(p.weights, s.lead, batch, s.T).row(t), m.weights, size_t(s.k) * sizeof(F));
           weighted_sum(p.values.dtype, m.list.rows, m.list.weights, n, p.V, m.read);
           write_row<F>(m.read, p.V, p.read.dtype, TokenRows(p.read, s.lead, batch, s.T).row(t));
         });
}

template <class F>
void backward(const TopkReadBackward& p) {
  const Choice& c = p.search.choice;
  const int64_t VP = round_up(p.V, kLanes<F>), tokens = c.tokens();
  const bool read = p.d_values && p.d_read;  // else nothing is added to the values
  Buffer<F> ds(c.all_tokens() * c.k), weights(read ? c.all_tokens() * c.k : 0);
  struct Memory {
    RowList<F> list;
    F *read, *products;
    Memory(Arena& arena, int64_t k, int64_t VP)
        : list(RowList<F>::take(arena, k)), read(arena.take<F>(VP)), products(arena.take<F>(k)) {}
  };
  Arena measure;
  Memory(measure, c.k, VP);
  TokenPointers reads(read ? p.d_read : View{}, c.lead, c.T);
  if (p.d_values && !read)
    std::memset(p.d_values.view.data, 0, size_t(p.d_values.rows * p.V * size_of(p.values.dtype)));
  const Sum<F> d_values{read ? p.d_values : MemoryGradient{}, p.V, weights.data(), F(1), reads.data(), p.d_read.dtype};
  search_gradient(p.search, ds.data(), d_values, measure.used(), [&](int64_t batch, int64_t t, F* d, Arena arena) {
    Memory m(arena, c.k, VP);
    const auto* index = reinterpret_cast<const int64_t*>(TokenRows(c.indices, c.lead, batch, c.T).row(t));
    const auto* w = reinterpret_cast<const F*>(TokenRows(p.weights, c.lead, batch, c.T).row(t));
    if (read) {
      F* copy = weights.data() + (batch * tokens + t) * c.k;
      for (int64_t j = 0; j < c.k; ++j) copy[j] = w[j];
    }
    for (int64_t j = 0; j < c.k; ++j) d[j] = 0;
    if (p.d_read) {
      const char* values = p.values.batch(c.lead, batch);
      for (int64_t j = 0; j < c.k; ++j) {
        if (index[j] >= 0) m.list.push(values + index[j] * p.values.row, F(0));
      }
      m.list.close();
      for (int64_t v = p.V; v < VP; ++v) m.read[v] = 0;
      const TokenRows d_read(p.d_read, c.lead, batch, c.T);
      read_row<F>(d_read.row(t), d_read.dtype, p.V, m.read);
      row_products(p.values.dtype, m.list.rows, m.list.n, p.V, m.read, m.products);
      const F* product = m.products;
      for (int64_t j = 0; j < c.k; ++j) d[j] = index[j] >= 0 ? *product++ : F(0);
    }
    if (p.d_weights) {
      const auto* dw = reinterpret_cast<const F*>(TokenRows(p.d_weights, c.lead, batch, c.T).row(t));
      for (int64_t j = 0; j < c.k; ++j) d[j] += dw[j];
    }
    F mean = 0;
    for (int64_t j = 0; j < c.k; ++j) mean += index[j] < 0 ? F(0) : w[j] * d[j];
    for (int64_t j = 0; j < c.k; ++j) d[j] = index[j] < 0 ? F(0) : w[j] * (d[j] - mean);
  });
}

}  // namespace

void topk_read(const TopkRead& p) {
  if (p.search.query.dtype == DType::f64) forward<double>(p);
  else forward<float>(p);
}

void topk_read_backward(const TopkReadBackward& p) {
  if (p.search.query.dtype == DType::f64) backward<double>(p);
  else backward<float>(p);
}

}  // namespace mk::MK_ISA
