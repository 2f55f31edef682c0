// topk_read:  r_t = sum_j softmax_j(s[t, i_j]) v_{i_j} over the k best slots i_j of a search
//
// The search compares N keys and the read takes k rows, so the cost is that of the search (cpu/tiles/search.h). The
// read and its gradient are in cpu/tiles/chosen_read.h, the gradient of the scores in cpu/tiles/search_gradient.h.
#include "params/topk_read.h"

#include "cpu/tiles/chosen_read.h"
#include "cpu/tiles/search.h"
#include "cpu/tiles/search_gradient.h"

namespace mk::MK_ISA {
namespace {

template <class F>
void forward(const TopkRead& p) {
  const TopkSearch& s = p.search;
  const Choice found{s.lead, s.T, s.k, s.N, s.indices};
  const ChosenRead<F> read(found, p.V, p.values, p.read, p.weights, p.lse);
  search(s, read.bytes(), read);
}

template <class F>
void backward(const TopkReadBackward& p) {
  const Choice& c = p.search.choice;
  ChosenReadGradient<F> read(c, p.V, p.values, p.weights, p.d_read, p.d_weights, p.d_lse, p.d_values);
  Buffer<F> ds(c.all_tokens() * c.k);
  search_gradient(p.search, ds.data(), read.values(), read.bytes(),
                  [&](int64_t batch, int64_t t, F* d, Arena arena) { read.ds(batch, t, d, arena); });
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
