// topk_search, topk_read, product_key_search: what touches k slots of a token.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/product_key_search.h"
#include "cpu/topk_read.h"
#include "kernels.h"

namespace native {
namespace {

// Gradients of memory are written whole, in the dtype of their argument.
mk::MemoryGradient whole(const Tensor& t) { return {t.view(), t.all_rows()}; }

// The dtype of a token gradient: that of its argument, unless the argument is broadcast and the rows are summed
// afterwards.
DType token_dtype(const Case& c, const Tensor& argument) {
  return argument.layout().has == c.all ? argument.dtype() : c.stats();
}

mk::Choice choice(const Case& c, const Tensor& indices) { return {c.lead, c.T, c.k, c.N, indices.view()}; }

// Scores are exact in float, so the slots that must be found are certain, ties included.
struct Searched {
  static constexpr double kScale = 0.5;
  Random random;
  Tensor query, keys, mask;
  Wide q, k, m, scores, indices;

  explicit Searched(const Case& c)
      : random(c.seed),
        query(quarters(c.dtype, c.of(c.query, c.T, c.K), random, c.gap)),
        keys(quarters(c.dtype, c.of(c.keys, c.N, c.K), random, c.gap)),
        mask(slot_mask(c, random)),
        m(mask.wide()),
        scores(c.tokens(c.k), -kInfinity),
        indices(c.tokens(c.k), -1) {
    poison_empty(m, keys);
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
        want_keys(gradient(in.random, in.keys.layout())),
        want_mask(gradient(in.random, in.mask)),
        query(token_dtype(c, in.query), want_query),
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
  Tensor values = uniform(c.content, c.of(c.values, c.N, c.V), in.random, -1, 1, c.gap);
  poison_empty(in.m, values);
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
  Wide want_dv = gradient(in.random, values.layout());
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

// The half is one leading dimension more, of size 2. Scores are exact in float.
void product_key_search(const Case& c) {
  Random random(c.seed);
  const int64_t n = c.N % 19, h = c.K;
  mk::Lead lead = c.lead;
  const uint32_t half = 1u << lead.rank;
  lead.size[lead.rank] = 2, lead.shared[lead.rank++] = false;
  const double scale = 0.5;
  const Layout results(lead, c.all, c.T, c.k), rows(lead, c.all | half, c.T, h);
  const Tensor query = quarters(c.dtype, Layout(lead, c.query | half, c.T, h), random, c.gap);
  const Tensor subkeys = quarters(c.dtype, Layout(lead, c.keys | half, n, h), random, c.gap);
  const Tensor d_scores = uniform(c.dtype, results, random, -1, 1, c.gap);
  const Wide q = query.wide(), k = subkeys.wide(), ds = d_scores.wide();
  Wide want_scores(results, -kInfinity), want_indices(results, -1);
  Wide want_dq = gradient(random, rows), want_dk = gradient(random, subkeys.layout());
  std::vector<double> s(size_t(n * n));
  std::vector<int64_t> order(size_t(n * n));
  for (int64_t place = 0; place < rows.places(); place += 2) {
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t i = 0; i < n * n; ++i) {
        s[size_t(i)] = scale * (dot(q.row(place, t), k.row(place, i / n), h) +
                                dot(q.row(place + 1, t), k.row(place + 1, i % n), h));
      }
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return s[size_t(i)] > s[size_t(j)]; });
      for (int64_t j = 0; j < std::min(c.k, n * n); ++j) {
        const int64_t slot = order[size_t(j)];
        want_scores.row(place, t)[j] = s[size_t(slot)];
        want_indices.row(place, t)[j] = double(slot);
        for (int64_t of = 0; of < 2; ++of) {
          const int64_t row = of == 0 ? slot / n : slot % n;
          const double d = scale * ds.row(place, t)[j];
          if (want_dq) add(d, k.row(place + of, row), h, want_dq.row(place + of, t));
          if (want_dk) add(d, q.row(place + of, t), h, want_dk.row(place + of, row));
        }
      }
    }
  }
  Tensor scores(c.dtype, results), indices(DType::i64, results);
  const mk::TopkSearch halves{lead, c.T, n, h, std::min(c.k, n), query.view(), subkeys.view(), {}, {}, {}, scale};
  const mk::ProductKeySearch p{halves, c.k, scores.view(), indices.view()};
  verify(c, "product_key_search", {{"scores", &scores, &want_scores}, {"indices", &indices, &want_indices}},
         [&] { MK_CALL(product_key_search, p); });

  const Tensor found(DType::i64, want_indices);
  Tensor dq(query.layout().has == rows.has ? c.dtype : c.stats(), want_dq), dk(c.dtype, want_dk);
  const mk::ProductKeySearchBackward b{{{lead, c.T, c.k, n, found.view()},
                                        h,
                                        query.view(),
                                        subkeys.view(),
                                        d_scores.view(),
                                        dq.view(),
                                        whole(dk),
                                        {},
                                        scale}};
  verify(c, "product_key_search_backward", {{"d_query", &dq, &want_dq}, {"d_subkeys", &dk, &want_dk}},
         [&] { MK_CALL(product_key_search_backward, b); });
}

}  // namespace native
