// selected_scores, selected_read and indexer_search: slots that are named, and slots scored by several heads.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels.h"
#include "params/indexer_search.h"
#include "params/selected_read.h"
#include "params/selected_scores.h"

namespace native {
namespace {

constexpr double kScale = 0.5;

Wide some_indices(const Case& c, Random& random) {
  Wide i(c.tokens(c.k));
  for (double& x : i.all()) x = double(random.below(c.N + 1) - 1);
  return i;
}

mk::Choice choice(const Case& c, const Tensor& indices) { return {c.lead, c.T, c.k, c.N, indices.view()}; }

// Query, keys, mask and the indices that tokens name. ds: from gradients of scores to those of the arguments.
struct Named {
  Random random;
  Tensor query;
  SlotRows keys;
  Tensor mask;
  Wide q, k, m, i;
  Tensor indices;
  Wide want_dq, want_dk, want_dm;
  Tensor dq, dk, dm;

  Named(const Case& c, bool masked)
      : random(c.seed),
        query(uniform(c.dtype, c.of(c.query, c.T, c.K), random, -1, 1, c.gap)),
        keys(c, c.packed_keys, c.keys, c.K, random),
        mask(masked ? slot_mask(c, random) : Tensor()),
        m(mask.wide()),
        i(some_indices(c, random)),
        indices(DType::i64, i, c.gap) {
    keys.poison_empty(m);
    q = query.wide(), k = keys.wide();
    want_dq = gradient(random, c.tokens(c.K)), want_dk = keys.gradient(random);
    want_dm = masked ? gradient(random, mask) : Wide();
    dq = Tensor(token_dtype(c, query, c.all), want_dq);
    dk = Tensor(c.dtype, want_dk), dm = Tensor(mask.dtype(), want_dm);
  }
  // The slot of an entry; -1 if it may not be addressed.
  int64_t slot(int64_t place, int64_t t, int64_t j) const {
    const auto at = int64_t(i.row(place, t)[j]);
    return at >= 0 && m && *m.row(place, at) == -kInfinity ? -1 : at;
  }
  double score(int64_t place, int64_t t, int64_t at, int64_t K) const {
    return kScale * dot(q.row(place, t), k.row(place, at), K) + (m ? *m.row(place, at) : 0);
  }
  void add_score(int64_t place, int64_t t, int64_t at, double ds) {
    ScoreGradients{&q, &k, &want_dq, &want_dk, &want_dm, kScale}.add_score(place, t, at, ds);
  }
  mk::TopkSearchBackward backward(const Case& c, const Tensor& d_scores) const {
    return {choice(c, indices), c.K,       query.view(), keys.view(), d_scores.view(),
            dq.view(),          whole(dk), whole(dm),    kScale};
  }
};

}  // namespace

void selected_scores(const Case& c) {
  Named in(c, false);
  const Tensor d_scores = uniform(c.dtype, c.tokens(c.k), in.random, -1, 1);
  const Wide ds = d_scores.wide();
  Wide want(c.tokens(c.k), -kInfinity);
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t j = 0; j < c.k; ++j) {
        const int64_t at = in.slot(place, t, j);
        if (at < 0) continue;
        want.row(place, t)[j] = in.score(place, t, at, c.K);
        in.add_score(place, t, at, ds.row(place, t)[j]);
      }
    }
  }
  Tensor scores(c.dtype, c.tokens(c.k));
  const mk::SelectedScores p{choice(c, in.indices), c.K, in.query.view(), in.keys.view(), scores.view(), kScale};
  verify(c, "selected_scores", {{"scores", &scores, &want}}, [&] { MK_CALL(selected_scores, p); });
  const mk::TopkSearchBackward b = in.backward(c, d_scores);
  verify(c, "selected_scores_backward", {{"d_query", &in.dq, &in.want_dq}, {"d_keys", &in.dk, &in.want_dk}},
         [&] { MK_CALL(topk_search_backward, b); });
}

void selected_read(const Case& c) {
  Named in(c, true);
  SlotRows values(c, c.packed_values, c.values, c.V, in.random);
  values.poison_empty(in.m);
  const Wide v = values.wide();
  Wide want(c.tokens(c.V)), want_weights(c.tokens(c.k)), want_lse(c.tokens(1), -kInfinity);
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      double* w = want_weights.row(place, t);
      double total = 0;
      for (int64_t j = 0; j < c.k; ++j) {
        const int64_t at = in.slot(place, t, j);
        if (at >= 0) total += w[j] = std::exp(in.score(place, t, at, c.K));
      }
      if (total == 0) continue;
      *want_lse.row(place, t) = std::log(total);
      for (int64_t j = 0; j < c.k; ++j) {
        const int64_t at = in.slot(place, t, j);
        w[j] /= total;
        if (at >= 0) add(w[j], v.row(place, at), c.V, want.row(place, t));
      }
    }
  }
  Tensor read(c.dtype, c.tokens(c.V)), weights(c.stats(), c.tokens(c.k)), lse(c.stats(), c.tokens(1));
  const mk::SelectedRead p{choice(c, in.indices),
                           c.K,
                           c.V,
                           in.query.view(),
                           in.keys.view(),
                           values.view(),
                           in.mask.view(),
                           read.view(),
                           weights.view(),
                           lse.view(),
                           kScale};
  verify(c, "selected_read", {{"read", &read, &want}, {"weights", &weights, &want_weights}, {"lse", &lse, &want_lse}},
         [&] { MK_CALL(selected_read, p); });

  const Tensor saved(c.stats(), want_weights);
  const Tensor d_read = in.random.one_in(4) ? Tensor() : uniform(c.dtype, c.tokens(c.V), in.random, -1, 1);
  const Tensor d_weights = in.random.one_in(2) ? Tensor() : uniform(c.stats(), c.tokens(c.k), in.random, -1, 1);
  const Tensor d_lse = in.random.one_in(2) ? Tensor() : uniform(c.stats(), c.tokens(1), in.random, -1, 1);
  const Wide w = saved.wide(), dr = d_read.wide(), dw = d_weights.wide(), dl = d_lse.wide();
  Wide want_dv = values.gradient(in.random);
  std::vector<double> g(size_t(c.k));
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      const double* x = w.row(place, t);
      double mean = dl ? -*dl.row(place, t) : 0;
      for (int64_t j = 0; j < c.k; ++j) {
        const int64_t at = in.slot(place, t, j);
        g[size_t(j)] =
            (dr && at >= 0 ? dot(dr.row(place, t), v.row(place, at), c.V) : 0) + (dw ? dw.row(place, t)[j] : 0);
        if (at >= 0) mean += x[j] * g[size_t(j)];
      }
      for (int64_t j = 0; j < c.k; ++j) {
        const int64_t at = in.slot(place, t, j);
        if (at < 0) continue;
        in.add_score(place, t, at, x[j] * (g[size_t(j)] - mean));
        if (want_dv && dr) add(x[j], dr.row(place, t), c.V, want_dv.row(place, at));
      }
    }
  }
  Tensor dv(c.content, want_dv);
  mk::SelectedReadBackward b;
  b.read.search = in.backward(c, {});
  b.read.V = c.V, b.read.values = values.view(), b.read.weights = saved.view();
  b.read.d_read = d_read.view(), b.read.d_weights = d_weights.view(), b.read.d_values = whole(dv);
  b.mask = in.mask.view(), b.read.d_lse = d_lse.view();
  verify(c, "selected_read_backward",
         {{"d_query", &in.dq, &in.want_dq},
          {"d_keys", &in.dk, &in.want_dk},
          {"d_mask", &in.dm, &in.want_dm},
          {"d_values", &dv, &want_dv}},
         [&] { MK_CALL(selected_read_backward, b); });
}

// Queries are rows t * H + h. Weights are small integers, so that scores are exact in float.
void indexer_search(const Case& c) {
  Random random(c.seed);
  const int64_t H = 1 + c.V % 5;
  const Tensor query = quarters(c.dtype, c.of(c.query, c.T * H, c.K), random);
  const Tensor keys = quarters(c.dtype, c.of(c.keys, c.N, c.K), random, c.gap);
  const Tensor mask = slot_mask(c, random);
  Wide w(c.of(c.query, c.T, H));
  for (double& x : w.all()) x = double(random.below(4) - 1);
  const Tensor weights(c.dtype, w, c.gap);
  const Wide q = query.wide(), k = keys.wide(), m = mask.wide();
  Wide want(c.tokens(c.k), -kInfinity), want_indices(c.tokens(c.k), -1);
  const auto product = [&](int64_t place, int64_t t, int64_t h, int64_t i) {
    return kScale * dot(q.row(place, t * H + h), k.row(place, i), c.K);
  };
  std::vector<double> s(size_t(c.N));
  std::vector<int64_t> order(size_t(c.N));
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t i = 0; i < c.N; ++i) {
        double sum = m ? *m.row(place, i) : 0;
        for (int64_t h = 0; h < H; ++h) sum += w.row(place, t)[h] * std::max(0.0, product(place, t, h, i));
        s[size_t(i)] = sum;
      }
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return s[size_t(i)] > s[size_t(j)]; });
      for (int64_t j = 0; j < std::min(c.k, c.N) && s[size_t(order[size_t(j)])] != -kInfinity; ++j) {
        want.row(place, t)[j] = s[size_t(order[size_t(j)])];
        want_indices.row(place, t)[j] = double(order[size_t(j)]);
      }
    }
  }
  Tensor scores(c.dtype, c.tokens(c.k)), indices(DType::i64, c.tokens(c.k));
  mk::View tokens = query.view();
  tokens.row *= H;
  const mk::Heads heads{H, query.row_bytes(), weights.view()};
  const mk::IndexerSearch p{
      {c.lead, c.T, c.N, c.K, c.k, tokens, keys.view(), mask.view(), {}, scores.view(), indices.view(), kScale}, heads};
  verify(c, "indexer_search", {{"scores", &scores, &want}, {"indices", &indices, &want_indices}},
         [&] { MK_CALL(indexer_search, p); });

  const Tensor found(DType::i64, want_indices), d_scores = uniform(c.dtype, c.tokens(c.k), random, -1, 1);
  const Wide ds = d_scores.wide();
  Wide want_dq = gradient(random, c.of(c.all, c.T * H, c.K)), want_dw = gradient(random, c.tokens(H));
  Wide want_dk = gradient(random, keys.layout()), want_dm = gradient(random, mask);
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t j = 0; j < c.k; ++j) {
        const auto i = int64_t(want_indices.row(place, t)[j]);
        if (i < 0) continue;
        const double d = ds.row(place, t)[j];
        if (want_dm) *want_dm.row(place, i) += d;
        for (int64_t h = 0; h < H; ++h) {
          const double x = product(place, t, h, i);
          if (x <= 0) continue;
          if (want_dw) want_dw.row(place, t)[h] += d * x;
          const double g = kScale * d * w.row(place, t)[h];
          if (want_dq) add(g, k.row(place, i), c.K, want_dq.row(place, t * H + h));
          if (want_dk) add(g, q.row(place, t * H + h), c.K, want_dk.row(place, i));
        }
      }
    }
  }
  Tensor dq(c.stats(), want_dq), dw(c.stats(), want_dw), dk(c.dtype, want_dk), dm(mask.dtype(), want_dm);
  mk::View d_tokens = dq.view();
  d_tokens.row *= H;
  const mk::IndexerSearchBackward b{
      {choice(c, found), c.K, tokens, keys.view(), d_scores.view(), d_tokens, whole(dk), whole(dm), kScale},
      heads,
      dq ? dq.row_bytes() : 0,
      dw.view()};
  verify(
      c, "indexer_search_backward",
      {{"d_query", &dq, &want_dq}, {"d_weights", &dw, &want_dw}, {"d_keys", &dk, &want_dk}, {"d_mask", &dm, &want_dm}},
      [&] { MK_CALL(indexer_search_backward, b); });
}

namespace {
FAMILY(indexer_search)
FAMILY(selected_read)
FAMILY(selected_scores)
}  // namespace

}  // namespace native
