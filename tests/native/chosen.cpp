// topk_search and topk_read: what touches k slots of a token.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels.h"
#include "params/topk_read.h"

namespace native {
namespace {

mk::Choice choice(const Case& c, const Tensor& indices) { return {c.lead, c.T, c.k, c.N, indices.view()}; }

// Scores are exact in float, so the slots that must be found are certain, ties included.
struct Searched {
  static constexpr double kScale = 0.5;
  Random random;
  Tensor query;
  SlotRows keys;
  Tensor mask;
  Wide q, k, m, scores, indices;

  explicit Searched(const Case& c)
      : random(c.seed),
        query(quarters(c.dtype, c.of(c.query, c.T, c.K), random, c.gap)),
        keys(c, c.packed_keys, c.keys, c.K, random, true),
        mask(slot_mask(c, random)),
        m(mask.wide()),
        scores(c.tokens(c.k), -kInfinity),
        indices(c.tokens(c.k), -1) {
    keys.poison_empty(m);
    q = query.wide(), k = keys.wide();
    std::vector<int64_t> order(size_t(c.N));
    for (int64_t place = 0; place < c.places(); ++place) {
      const std::vector<double> s = native::scores(c, q, k, m, kScale, place);
      for (int64_t t = 0; t < c.T; ++t) {
        const double* x = s.data() + t * c.N;
        std::iota(order.begin(), order.end(), 0);
        const auto end = order.begin() + std::min(c.k, c.N);
        std::partial_sort(order.begin(), end, order.end(),
                          [x](int64_t i, int64_t j) { return x[i] != x[j] ? x[i] > x[j] : i < j; });
        for (int64_t j = 0; j < std::min(c.k, c.N) && x[order[size_t(j)]] != -kInfinity; ++j) {
          scores.row(place, t)[j] = x[order[size_t(j)]];
          indices.row(place, t)[j] = double(order[size_t(j)]);
        }
      }
    }
  }
  mk::TopkSearch search(const Case& c, const Tensor& found_scores, const Tensor& found) const {
    return {c.lead,       c.T,   c.N, c.K, c.k, query.view(), keys.view(), mask.view(), found_scores.view(),
            found.view(), kScale};
  }
};

// The gradients that follow from ds[t, j], of query, keys and mask.
struct SearchGradients {
  Wide want_query, want_keys, want_mask;
  Tensor query, keys, mask;

  SearchGradients(const Case& c, Searched& in)
      : want_query(gradient(in.random, c.tokens(c.K))),
        want_keys(in.keys.gradient(in.random)),
        want_mask(gradient(in.random, in.mask)),
        query(token_dtype(c, in.query, c.all), want_query),
        keys(c.dtype, want_keys),
        mask(in.mask.dtype(), want_mask) {}
  void add_score(const Searched& in, int64_t place, int64_t t, int64_t i, double ds) {
    ScoreGradients{&in.q, &in.k, &want_query, &want_keys, &want_mask, in.kScale}.add_score(place, t, i, ds);
  }
  mk::TopkSearchBackward backward(const Case& c, const Searched& in, const Tensor& indices,
                                  const Tensor& d_scores) const {
    return {choice(c, indices), c.K,         in.query.view(), in.keys.view(), d_scores.view(),
            query.view(),       whole(keys), whole(mask),     in.kScale};
  }
};

}  // namespace

void topk_search(const Case& c) {
  Searched in(c);
  Tensor scores(c.dtype, c.tokens(c.k)), indices(DType::i64, c.tokens(c.k));
  const mk::TopkSearch p = in.search(c, scores, indices);
  verify(c, "topk_search", {{"scores", &scores, &in.scores}, {"indices", &indices, &in.indices}},
         [&] { MK_CALL(topk_search, p); });

  const Tensor found(DType::i64, in.indices), d_scores = uniform(c.dtype, c.tokens(c.k), in.random, -1, 1);
  const Wide ds = d_scores.wide();
  SearchGradients d(c, in);
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t j = 0; j < c.k; ++j) {
        const auto i = int64_t(in.indices.row(place, t)[j]);
        if (i >= 0) d.add_score(in, place, t, i, ds.row(place, t)[j]);
      }
    }
  }
  const mk::TopkSearchBackward b = d.backward(c, in, found, d_scores);
  verify(c, "topk_search_backward",
         {{"d_query", &d.query, &d.want_query}, {"d_keys", &d.keys, &d.want_keys}, {"d_mask", &d.mask, &d.want_mask}},
         [&] { MK_CALL(topk_search_backward, b); });
}

void topk_read(const Case& c) {
  Searched in(c);
  SlotRows values(c, c.packed_values, c.values, c.V, in.random);
  values.poison_empty(in.m);
  const Wide v = values.wide();
  Wide want_read(c.tokens(c.V)), want_weights(c.tokens(c.k));
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      const double *s = in.scores.row(place, t), *i = in.indices.row(place, t);
      double* w = want_weights.row(place, t);
      double total = 0;
      for (int64_t j = 0; j < c.k && i[j] >= 0; ++j) total += w[j] = std::exp(s[j] - s[0]);
      for (int64_t j = 0; j < c.k && i[j] >= 0; ++j) {
        w[j] /= total;
        add(w[j], v.row(place, int64_t(i[j])), c.V, want_read.row(place, t));
      }
    }
  }
  Tensor read(c.dtype, c.tokens(c.V)), weights(c.stats(), c.tokens(c.k)), indices(DType::i64, c.tokens(c.k));
  const mk::TopkRead p{in.search(c, {}, indices), c.V, values.view(), read.view(), weights.view()};
  verify(c, "topk_read",
         {{"read", &read, &want_read}, {"weights", &weights, &want_weights}, {"indices", &indices, &in.indices}},
         [&] { MK_CALL(topk_read, p); });

  const Tensor found(DType::i64, in.indices), saved(c.stats(), want_weights);
  const Tensor d_read = in.random.one_in(4) ? Tensor() : uniform(c.dtype, c.tokens(c.V), in.random, -1, 1);
  const Tensor d_weights = in.random.one_in(2) ? Tensor() : uniform(c.stats(), c.tokens(c.k), in.random, -1, 1);
  const Wide w = saved.wide(), dr = d_read.wide(), dw = d_weights.wide();
  SearchGradients d(c, in);
  Wide want_dv = values.gradient(in.random);
  std::vector<double> g(size_t(c.k));
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      const double *index = in.indices.row(place, t), *x = w.row(place, t);
      double mean = 0;
      for (int64_t j = 0; j < c.k && index[j] >= 0; ++j) {
        g[size_t(j)] = dr ? dot(dr.row(place, t), v.row(place, int64_t(index[j])), c.V) : 0;
        g[size_t(j)] += dw ? dw.row(place, t)[j] : 0;
        mean += x[j] * g[size_t(j)];
      }
      for (int64_t j = 0; j < c.k && index[j] >= 0; ++j) {
        d.add_score(in, place, t, int64_t(index[j]), x[j] * (g[size_t(j)] - mean));
        if (want_dv && dr) add(x[j], dr.row(place, t), c.V, want_dv.row(place, int64_t(index[j])));
      }
    }
  }
  Tensor dv(c.content, want_dv);
  const mk::TopkReadBackward b{
      d.backward(c, in, found, {}), c.V, values.view(), saved.view(), d_read.view(), d_weights.view(), whole(dv)};
  verify(c, "topk_read_backward",
         {{"d_query", &d.query, &d.want_query},
          {"d_keys", &d.keys, &d.want_keys},
          {"d_mask", &d.mask, &d.want_mask},
          {"d_values", &dv, &want_dv}},
         [&] { MK_CALL(topk_read_backward, b); });
}

namespace {
FAMILY(topk_search)
FAMILY(topk_read)
}  // namespace

}  // namespace native
