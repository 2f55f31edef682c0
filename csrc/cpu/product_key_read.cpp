// product_key_read:  r_t = sum_j softmax_j(s[t, i_j]) v_{i_j} over the k best of n * n slots, whose keys are all pairs
// from two lists of n half keys
//
// Search and read are fused per token: its pairs are enumerated (cpu/tiles/pair_search.h), and it is read while their
// scores are in cache (cpu/tiles/chosen_read.h). Bound by the search of 2 n half keys and by the gather of k rows from
// n * n, few of which are in any cache.
#include "params/product_key_read.h"

#include "cpu/tiles/chosen_read.h"
#include "cpu/tiles/pair_search.h"

namespace mk::MK_ISA {
namespace {

template <class F>
void forward(const ProductKeyRead& p) {
  const TopkSearch& s = p.search.halves;
  const Choice found{without_half(s.lead), s.T, p.search.k, s.N * s.N, p.search.indices};
  const ChosenRead<F> read(found, p.V, p.values, p.read, p.weights, p.lse);
  search_pairs(s, p.search.k, read.bytes(), read);
}

// The gradient of a score belongs to a row of either half. It is computed once and kept for both.
template <class F>
void backward(const ProductKeyReadBackward& p) {
  Choice c = p.search.halves.choice;
  c.lead = without_half(c.lead);
  c.N *= c.N;
  ChosenReadGradient<F> read(c, p.V, p.values, p.weights, p.d_read, p.d_weights, p.d_lse, p.d_values);
  const int64_t tokens = c.tokens(), all = c.all_tokens(), step = most(1, 4096 / most(c.k, 1));
  Buffer<F> ds(all * c.k);
  parallel(div_up(all, step), read.bytes(), [&](int64_t task, char* memory) {
    const int64_t end = least(all, (task + 1) * step);
    for (int64_t at = task * step; at < end; ++at) {
      read.ds(at / tokens, at % tokens, ds.data() + at * c.k, Arena(memory));
    }
  });
  pair_gradient(p.search.halves, [&](int64_t batch, int64_t t, F* d, Arena) {
    const F* row = ds.data() + (batch * tokens + t) * c.k;
    std::copy(row, row + c.k, d);
  });
  const Sum<F> sum = read.values();
  sum_chosen(c, &sum, 1);
}

}  // namespace

void product_key_read(const ProductKeyRead& p) {
  if (p.search.halves.query.dtype == DType::f64) forward<double>(p);
  else forward<float>(p);
}

void product_key_read_backward(const ProductKeyReadBackward& p) {
  if (p.search.halves.query.dtype == DType::f64) backward<double>(p);
  else backward<float>(p);
}

}  // namespace mk::MK_ISA
