// product_key_search, product_key_read: slots whose keys are all pairs of two lists.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels.h"
#include "params/product_key_read.h"

namespace native {
namespace {

// Scores are exact in float, so the slots to be found are certain, ties included. The half is one more leading
// dimension, the last, of size 2: a place here is that of the first half, and the second half follows it.
struct Paired {
  static constexpr double kScale = 0.5;
  Random random;
  mk::Lead lead;
  uint32_t half;
  int64_t n, h;
  Tensor query, subkeys;
  Wide q, k, scores, indices;

  explicit Paired(const Case& c) : random(c.seed), lead(c.lead), half(1u << c.lead.rank), n(c.N % 19), h(c.K) {
    lead.size[lead.rank] = 2, lead.shared[lead.rank++] = false;
    query = quarters(c.dtype, Layout(lead, c.query | half, c.T, h), random, c.gap);
    subkeys = quarters(c.dtype, Layout(lead, c.keys | half, n, h), random, c.gap);
    q = query.wide(), k = subkeys.wide();
    scores = Wide(tokens(c, c.k), -kInfinity), indices = Wide(tokens(c, c.k), -1);
    std::vector<double> s(size_t(n * n));
    std::vector<int64_t> order(size_t(n * n));
    for (int64_t place = 0; place < scores.layout().places(); place += 2) {
      for (int64_t t = 0; t < c.T; ++t) {
        for (int64_t i = 0; i < n * n; ++i) {
          s[size_t(i)] = kScale * (dot(q.row(place, t), k.row(place, i / n), h) +
                                   dot(q.row(place + 1, t), k.row(place + 1, i % n), h));
        }
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return s[size_t(i)] > s[size_t(j)]; });
        for (int64_t j = 0; j < std::min(c.k, n * n); ++j) {
          scores.row(place, t)[j] = s[size_t(order[size_t(j)])];
          indices.row(place, t)[j] = double(order[size_t(j)]);
        }
      }
    }
  }
  // Rows that both halves share.
  Layout tokens(const Case& c, int64_t cols) const { return {lead, c.all, c.T, cols}; }
  mk::ProductKeySearch search(const Case& c, const Tensor& found_scores, const Tensor& found) const {
    return {{lead, c.T, n, h, std::min(c.k, n), query.view(), subkeys.view(), {}, {}, {}, {}, kScale},
            c.k,
            found_scores.view(),
            found.view()};
  }
};

// The gradients that follow from ds[t, j], of query and subkeys.
struct PairGradients {
  Wide want_query, want_subkeys;
  Tensor query, subkeys;

  PairGradients(const Case& c, Paired& in)
      : want_query(gradient(in.random, Layout(in.lead, c.all | in.half, c.T, in.h))),
        want_subkeys(gradient(in.random, in.subkeys.layout())),
        query(token_dtype(c, in.query, c.all | in.half), want_query),
        subkeys(c.dtype, want_subkeys) {}
  void add_score(const Paired& in, int64_t place, int64_t t, int64_t slot, double ds) {
    const int64_t rows[] = {slot / in.n, slot % in.n};
    for (int64_t of : {0, 1}) {
      if (want_query) add(in.kScale * ds, in.k.row(place + of, rows[of]), in.h, want_query.row(place + of, t));
      if (want_subkeys) add(in.kScale * ds, in.q.row(place + of, t), in.h, want_subkeys.row(place + of, rows[of]));
    }
  }
  mk::ProductKeySearchBackward backward(const Case& c, const Paired& in, const Tensor& indices,
                                        const Tensor& d_scores) const {
    return {{{in.lead, c.T, c.k, in.n, indices.view()},
             in.h,
             in.query.view(),
             in.subkeys.view(),
             d_scores.view(),
             query.view(),
             whole(subkeys),
             {},
             in.kScale}};
  }
};

}  // namespace

void product_key_search(const Case& c) {
  Paired in(c);
  Tensor scores(c.dtype, in.scores.layout()), indices(DType::i64, in.indices.layout());
  const mk::ProductKeySearch p = in.search(c, scores, indices);
  verify(c, "product_key_search", {{"scores", &scores, &in.scores}, {"indices", &indices, &in.indices}},
         [&] { MK_CALL(product_key_search, p); });

  const Tensor found(DType::i64, in.indices), d_scores = uniform(c.dtype, in.scores.layout(), in.random, -1, 1, c.gap);
  const Wide ds = d_scores.wide();
  PairGradients d(c, in);
  for (int64_t place = 0; place < ds.layout().places(); place += 2) {
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t j = 0; j < std::min(c.k, in.n * in.n); ++j) {
        d.add_score(in, place, t, int64_t(in.indices.row(place, t)[j]), ds.row(place, t)[j]);
      }
    }
  }
  const mk::ProductKeySearchBackward b = d.backward(c, in, found, d_scores);
  verify(c, "product_key_search_backward",
         {{"d_query", &d.query, &d.want_query}, {"d_subkeys", &d.subkeys, &d.want_subkeys}},
         [&] { MK_CALL(product_key_search_backward, b); });
}

void product_key_read(const Case& c) {
  Paired in(c);
  const int64_t found_slots = std::min(c.k, in.n * in.n);
  const Tensor values = uniform(c.content, Layout(in.lead, c.values, in.n * in.n, c.V), in.random, -1, 1, c.gap);
  const Wide v = values.wide();
  Wide want_read(in.tokens(c, c.V)), want_weights(in.tokens(c, c.k)), want_lse(in.tokens(c, 1), -kInfinity);
  const int64_t places = want_read.layout().places();
  for (int64_t place = 0; place < places; place += 2) {
    for (int64_t t = 0; t < c.T; ++t) {
      const double *s = in.scores.row(place, t), *i = in.indices.row(place, t);
      double* w = want_weights.row(place, t);
      double total = 0;
      for (int64_t j = 0; j < found_slots; ++j) total += w[j] = std::exp(s[j] - s[0]);
      if (total > 0) want_lse.row(place, t)[0] = s[0] + std::log(total);
      for (int64_t j = 0; j < found_slots; ++j) {
        w[j] /= total;
        add(w[j], v.row(place, int64_t(i[j])), c.V, want_read.row(place, t));
      }
    }
  }
  Tensor read(c.dtype, want_read.layout()), weights(c.stats(), want_weights.layout());
  Tensor indices(DType::i64, in.indices.layout()), lse(c.stats(), want_lse.layout());
  const mk::ProductKeyRead p{in.search(c, {}, indices), c.V, values.view(), read.view(), weights.view(), lse.view()};
  verify(c, "product_key_read",
         {{"read", &read, &want_read},
          {"weights", &weights, &want_weights},
          {"lse", &lse, &want_lse},
          {"indices", &indices, &in.indices}},
         [&] { MK_CALL(product_key_read, p); });

  const Tensor found(DType::i64, in.indices), saved(c.stats(), want_weights);
  const Tensor d_read = in.random.one_in(4) ? Tensor() : uniform(c.dtype, want_read.layout(), in.random, -1, 1);
  const Tensor d_weights = in.random.one_in(2) ? Tensor() : uniform(c.stats(), want_weights.layout(), in.random, -1, 1);
  const Tensor d_lse = in.random.one_in(2) ? Tensor() : uniform(c.stats(), want_lse.layout(), in.random, -1, 1);
  const Wide w = saved.wide(), dr = d_read.wide(), dw = d_weights.wide(), dl = d_lse.wide();
  PairGradients d(c, in);
  Wide want_dv = gradient(in.random, values.layout());
  std::vector<double> g(size_t(c.k));
  for (int64_t place = 0; place < places; place += 2) {
    for (int64_t t = 0; t < c.T; ++t) {
      const double *index = in.indices.row(place, t), *x = w.row(place, t);
      double mean = dl ? -dl.row(place, t)[0] : 0;
      for (int64_t j = 0; j < found_slots; ++j) {
        g[size_t(j)] = dr ? dot(dr.row(place, t), v.row(place, int64_t(index[j])), c.V) : 0;
        g[size_t(j)] += dw ? dw.row(place, t)[j] : 0;
        mean += x[j] * g[size_t(j)];
      }
      for (int64_t j = 0; j < found_slots; ++j) {
        d.add_score(in, place, t, int64_t(index[j]), x[j] * (g[size_t(j)] - mean));
        if (want_dv && dr) add(x[j], dr.row(place, t), c.V, want_dv.row(place, int64_t(index[j])));
      }
    }
  }
  Tensor dv(c.content, want_dv);
  const mk::ProductKeyReadBackward b{d.backward(c, in, found, {}),
                                     c.V,
                                     values.view(),
                                     saved.view(),
                                     d_read.view(),
                                     d_weights.view(),
                                     d_lse.view(),
                                     whole(dv)};
  verify(
      c, "product_key_read_backward",
      {{"d_query", &d.query, &d.want_query}, {"d_subkeys", &d.subkeys, &d.want_subkeys}, {"d_values", &dv, &want_dv}},
      [&] { MK_CALL(product_key_read_backward, b); });
}

namespace {
FAMILY(product_key_search)
FAMILY(product_key_read)
}  // namespace

}  // namespace native
