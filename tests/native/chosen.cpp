// topk_search, paged_topk_search and topk_read: ops on k slots per token.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels.h"
#include "params/paged_topk_search.h"
#include "params/topk_read.h"

namespace native {
namespace {

mk::Choice choice(const Case& c, const Tensor& indices) { return {c.lead, c.T, c.k, c.N, indices.view()}; }

// Scores are exact in float, so the slots to be found are certain, ties included.
struct Searched {
  static constexpr double kScale = 0.5;
  Random random;
  Tensor query;
  SlotRows keys;
  Tensor mask, range;
  Wide q, k, m, scores, indices;

  // `numbers`: the slot numbers of the rows, if not 0 .. N - 1; negative where a row is none.
  explicit Searched(const Case& c, const std::vector<int64_t>& numbers = {})
      : random(c.seed),
        query(quarters(c.dtype, c.of(c.query, c.T, c.K), random, c.gap)),
        keys(c, c.packed_keys, c.keys, c.K, random, true),
        mask(slot_mask(c, random)),
        range(numbers.empty() ? slot_range(c, random) : Tensor()),
        m(mask.wide()),
        scores(c.tokens(c.k), -kInfinity),
        indices(c.tokens(c.k), -1) {
    keys.poison_empty(m);
    q = query.wide(), k = keys.wide();
    const Wide ends = range.wide();
    std::vector<int64_t> order(size_t(c.N));
    const auto number = [&](int64_t i) { return numbers.empty() ? i : numbers[size_t(i)]; };
    for (int64_t place = 0; place < c.places(); ++place) {
      std::vector<double> s = native::scores(c, q, k, m, kScale, place);
      for (int64_t i = 0; i < c.T * c.N; ++i) s[size_t(i)] = number(i % c.N) < 0 ? -kInfinity : s[size_t(i)];
      close(c, ends, place, s);
      for (int64_t t = 0; t < c.T; ++t) {
        const double* x = s.data() + t * c.N;
        std::iota(order.begin(), order.end(), 0);
        const auto end = order.begin() + std::min(c.k, c.N);
        std::partial_sort(order.begin(), end, order.end(),
                          [&](int64_t i, int64_t j) { return x[i] != x[j] ? x[i] > x[j] : number(i) < number(j); });
        for (int64_t j = 0; j < std::min(c.k, c.N) && x[order[size_t(j)]] != -kInfinity; ++j) {
          scores.row(place, t)[j] = x[order[size_t(j)]];
          indices.row(place, t)[j] = double(number(order[size_t(j)]));
        }
      }
    }
  }
  mk::TopkSearch search(const Case& c, const Tensor& found_scores, const Tensor& found) const {
    return {c.lead,       c.T,         c.N,         c.K,          c.k,
            query.view(), keys.view(), mask.view(), range.view(), found_scores.view(),
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

// Frames of a divisor of N slots, in reverse order with gaps, one of them without a page. What an earlier search found
// is worse than all, or better than all: then it is the result.
void paged_topk_search(const Case& c) {
  Random random(c.seed + 1);
  int64_t S = 1 + int64_t(random.below(7));
  while (c.N % S != 0) --S;
  const int64_t F = c.N / S;
  std::vector<int64_t> numbers(size_t(c.N));
  Wide pages({c.lead, 0, 1, F}, 0);
  for (int64_t f = 0; f < F; ++f) {
    const int64_t page = f == 1 ? -1 : 2 * (F - f);
    pages.row(0, 0)[f] = double(page);
    for (int64_t j = 0; j < S; ++j) numbers[size_t(f * S + j)] = page < 0 ? -1 : page * S + j;
  }
  Searched in(c, numbers);
  const bool found = random.one_in(2), better = random.one_in(2);
  const double far = better ? 1e6 : -1e6;
  Wide earlier_scores(c.tokens(c.k)), earlier_slots(c.tokens(c.k));
  const int64_t beyond = 4 * c.N + 100;  // no page has such a slot
  for (int64_t place = 0; found && place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      double *score = in.scores.row(place, t), *slot = in.indices.row(place, t);
      const int64_t first = better ? 0 : std::find(slot, slot + c.k, -1.0) - slot;
      for (int64_t j = 0; j < c.k; ++j) {
        earlier_scores.row(place, t)[j] = far - double(j), earlier_slots.row(place, t)[j] = double(beyond + j);
        if (j >= first) score[j] = far - double(j - first), slot[j] = double(beyond + j - first);
      }
    }
  }
  const Tensor page_numbers(DType::i64, pages);
  const Tensor best_scores = found ? Tensor(c.stats(), earlier_scores) : Tensor();
  const Tensor best_slots = found ? Tensor(DType::i64, earlier_slots) : Tensor();
  const mk::Frames frames{F, S, page_numbers.view(), best_scores.view(), best_slots.view()};
  Tensor scores(c.stats(), c.tokens(c.k)), slots(DType::i64, c.tokens(c.k));
  const mk::PagedTopkSearch p{in.search(c, scores, slots), frames};
  verify(c, "paged_topk_search", {{"scores", &scores, &in.scores}, {"slots", &slots, &in.indices}},
         [&] { MK_CALL(paged_topk_search, p); });

  const Tensor chosen(DType::i64, in.indices), d_scores = uniform(c.stats(), c.tokens(c.k), in.random, -1, 1);
  const Wide ds = d_scores.wide();
  SearchGradients d(c, in);
  Wide want_best(c.tokens(c.k));
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t j = 0; j < c.k; ++j) {
        const auto slot = int64_t(in.indices.row(place, t)[j]);
        const int64_t i = std::find(numbers.begin(), numbers.end(), slot) - numbers.begin();
        if (slot >= beyond) want_best.row(place, t)[slot - beyond] = ds.row(place, t)[j];
        else if (slot >= 0) d.add_score(in, place, t, i, ds.row(place, t)[j]);
      }
    }
  }
  Tensor d_best = found ? Tensor(c.stats(), want_best) : Tensor();
  const mk::PagedTopkSearchBackward b{d.backward(c, in, {}, d_scores), frames, chosen.view(), d_best.view()};
  verify(c, "paged_topk_search_backward",
         {{"d_query", &d.query, &d.want_query},
          {"d_keys", &d.keys, &d.want_keys},
          {"d_mask", &d.mask, &d.want_mask},
          {"d_best", &d_best, &want_best}},
         [&] { MK_CALL(paged_topk_search_backward, b); });
}

void topk_read(const Case& c) {
  Searched in(c);
  SlotRows values(c, c.packed_values, c.values, c.V, in.random);
  values.poison_empty(in.m);
  const Wide v = values.wide();
  Wide want_read(c.tokens(c.V)), want_weights(c.tokens(c.k)), want_lse(c.tokens(1), -kInfinity);
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      const double *s = in.scores.row(place, t), *i = in.indices.row(place, t);
      double* w = want_weights.row(place, t);
      double total = 0;
      for (int64_t j = 0; j < c.k && i[j] >= 0; ++j) total += w[j] = std::exp(s[j] - s[0]);
      if (total > 0) want_lse.row(place, t)[0] = s[0] + std::log(total);
      for (int64_t j = 0; j < c.k && i[j] >= 0; ++j) {
        w[j] /= total;
        add(w[j], v.row(place, int64_t(i[j])), c.V, want_read.row(place, t));
      }
    }
  }
  Tensor read(c.dtype, c.tokens(c.V)), weights(c.stats(), c.tokens(c.k)), indices(DType::i64, c.tokens(c.k));
  Tensor lse(c.stats(), c.tokens(1));
  const mk::TopkRead p{in.search(c, {}, indices), c.V, values.view(), read.view(), weights.view(), lse.view()};
  verify(c, "topk_read",
         {{"read", &read, &want_read},
          {"weights", &weights, &want_weights},
          {"lse", &lse, &want_lse},
          {"indices", &indices, &in.indices}},
         [&] { MK_CALL(topk_read, p); });

  const Tensor found(DType::i64, in.indices), saved(c.stats(), want_weights);
  const Tensor d_read = in.random.one_in(4) ? Tensor() : uniform(c.dtype, c.tokens(c.V), in.random, -1, 1);
  const Tensor d_weights = in.random.one_in(2) ? Tensor() : uniform(c.stats(), c.tokens(c.k), in.random, -1, 1);
  const Tensor d_lse = in.random.one_in(2) ? Tensor() : uniform(c.stats(), c.tokens(1), in.random, -1, 1);
  const Wide w = saved.wide(), dr = d_read.wide(), dw = d_weights.wide(), dl = d_lse.wide();
  SearchGradients d(c, in);
  Wide want_dv = values.gradient(in.random);
  std::vector<double> g(size_t(c.k));
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      const double *index = in.indices.row(place, t), *x = w.row(place, t);
      double mean = dl ? -dl.row(place, t)[0] : 0;
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
  const mk::TopkReadBackward b{d.backward(c, in, found, {}),
                               c.V,
                               values.view(),
                               saved.view(),
                               d_read.view(),
                               d_weights.view(),
                               d_lse.view(),
                               whole(dv)};
  verify(c, "topk_read_backward",
         {{"d_query", &d.query, &d.want_query},
          {"d_keys", &d.keys, &d.want_keys},
          {"d_mask", &d.mask, &d.want_mask},
          {"d_values", &dv, &want_dv}},
         [&] { MK_CALL(topk_read_backward, b); });
}

namespace {
FAMILY(topk_search)
FAMILY(paged_topk_search)
FAMILY(topk_read)
}  // namespace

}  // namespace native
