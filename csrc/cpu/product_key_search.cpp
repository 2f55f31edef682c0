// product_key_search:  the k largest of s[t, i n + j] = scale (<q_t[:h], c_i> + <q_t[h:], d_j>), in order, equal sums by
// smaller slot number. Search and gradient are those of cpu/tiles/pair_search.h, the latter with ds = d_scores: only rows
// of chosen pairs are read or summed.
#include "params/product_key_search.h"

#include "cpu/tiles/pair_search.h"

namespace mk::MK_ISA {
namespace {

template <class F>
void forward(const ProductKeySearch& p) {
  const Lead lead = without_half(p.halves.lead);
  const int64_t T = p.halves.T;
  search_pairs(p.halves, p.k, size_t(p.k) * sizeof(F) + 64,
               [&](int64_t batch, int64_t t, const F* scores, const int64_t* slots, int64_t n, Arena arena) {
                 F* row = arena.take<F>(p.k);
                 auto* index = reinterpret_cast<int64_t*>(TokenRows(p.indices, lead, batch, T).row(t));
                 for (int64_t j = 0; j < p.k; ++j) {
                   row[j] = j < n ? scores[j] : -kInf<F>;
                   index[j] = j < n ? slots[j] : -1;
                 }
                 write_row<F>(row, p.k, p.scores.dtype, TokenRows(p.scores, lead, batch, T).row(t));
               });
}

template <class F>
void backward(const ProductKeySearchBackward& p) {
  const TopkSearchBackward& b = p.halves;
  const Choice& c = b.choice;
  const Lead lead = without_half(c.lead);
  pair_gradient(b, [&](int64_t batch, int64_t t, F* d, Arena) {
    const auto* pair = reinterpret_cast<const int64_t*>(TokenRows(c.indices, lead, batch, c.T).row(t));
    read_row<F>(TokenRows(b.d_scores, lead, batch, c.T).row(t), b.d_scores.dtype, c.k, d);
    for (int64_t j = 0; j < c.k; ++j) d[j] = pair[j] < 0 ? F(0) : d[j];
  });
}

}  // namespace

void product_key_search(const ProductKeySearch& p) {
  if (p.halves.query.dtype == DType::f64) forward<double>(p);
  else forward<float>(p);
}

void product_key_search_backward(const ProductKeySearchBackward& p) {
  if (p.halves.query.dtype == DType::f64) backward<double>(p);
  else backward<float>(p);
}

}  // namespace mk::MK_ISA
