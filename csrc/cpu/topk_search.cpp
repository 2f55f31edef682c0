// topk_search:  the k largest of s[t, i] = scale <q_t, k_i> + mask_i, exactly, in order, ties to the smaller index.
// The search is that of cpu/tiles/search.h, the gradient that of cpu/tiles/search_gradient.h with ds = d_scores: only chosen
// rows are read or summed.
#include "params/topk_search.h"

#include "cpu/tiles/search.h"
#include "cpu/tiles/search_gradient.h"

namespace mk::MK_ISA {
namespace {

template <class F>
void forward(const TopkSearch& p) {
  search(p, size_t(p.k) * sizeof(F) + 64,
         [&](int64_t batch, int64_t t, const F* scores, const int64_t* slots, int64_t n, Arena arena) {
           F* row = arena.take<F>(p.k);
           auto* index = reinterpret_cast<int64_t*>(TokenRows(p.indices, p.lead, batch, p.T).row(t));
           for (int64_t j = 0; j < p.k; ++j) {
             row[j] = j < n ? scores[j] : -kInf<F>;
             index[j] = j < n ? slots[j] : -1;
           }
           write_row<F>(row, p.k, p.scores.dtype, TokenRows(p.scores, p.lead, batch, p.T).row(t));
         });
}

template <class F>
void backward(const TopkSearchBackward& p) {
  const Choice& c = p.choice;
  Buffer<F> ds(c.all_tokens() * c.k);
  search_gradient(p, ds.data(), Sum<F>{}, 0, [&](int64_t batch, int64_t t, F* d, Arena) {
    const auto* index = reinterpret_cast<const int64_t*>(TokenRows(c.indices, c.lead, batch, c.T).row(t));
    read_row<F>(TokenRows(p.d_scores, c.lead, batch, c.T).row(t), p.d_scores.dtype, c.k, d);
    for (int64_t j = 0; j < c.k; ++j) d[j] = index[j] < 0 ? F(0) : d[j];
  });
}

}  // namespace

void topk_search(const TopkSearch& p) {
  if (p.query.dtype == DType::f64) forward<double>(p);
  else forward<float>(p);
}

void topk_search_backward(const TopkSearchBackward& p) {
  if (p.query.dtype == DType::f64) backward<double>(p);
  else backward<float>(p);
}

}  // namespace mk::MK_ISA
