// softmax_read, additive_read, address, slot_usage: ops that weigh every slot.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "params/additive_read.h"
#include "params/address.h"
#include "params/slot_usage.h"
#include "params/softmax_read.h"

namespace native {
namespace {

// Query, keys and mask of a case, as tensors and as double.
struct Scored {
  Random random;
  double scale;
  Tensor query;
  SlotRows keys;
  Tensor mask, range;
  Wide q, k, m, ends;

  explicit Scored(const Case& c) : Scored(c, c.dtype) {}
  Scored(const Case& c, DType of_keys)
      : random(c.seed),
        scale(3 / std::sqrt(double(c.K))),
        query(uniform(c.dtype, c.of(c.query, c.T, c.K), random, -1, 1, c.gap)),
        keys(c, of_keys, c.keys, c.K, random),
        mask(slot_mask(c, random)),
        range(slot_range(c, random)) {
    m = mask.wide(), ends = range.wide();
    keys.poison_empty(m);
    q = query.wide(), k = keys.wide();
  }
  template <class Params>
  void fill(const Case& c, Params& p) const {
    p.lead = c.lead, p.T = c.T, p.N = c.N, p.K = c.K;
    p.query = query.view(), p.keys = keys.view(), p.mask = mask.view();
    p.range = range.view(), p.scale = scale;
  }
  std::vector<double> at(const Case& c, int64_t place) const {
    std::vector<double> s = scores(c, q, k, m, scale, place);
    close(c, ends, place, s);
    return s;
  }
};

double log_sum(const double* s, int64_t n) {
  const double top = n > 0 ? *std::max_element(s, s + n) : -kInfinity;
  if (top == -kInfinity) return top;
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(s[i] - top);
  return top + std::log(sum);
}

double share(double score, double lse) { return score == -kInfinity || lse == -kInfinity ? 0 : std::exp(score - lse); }

Wide lse_of(const Case& c, const Scored& in) {
  Wide lse(c.tokens(1));
  for (int64_t place = 0; place < c.places(); ++place) {
    const std::vector<double> s = in.at(c, place);
    for (int64_t t = 0; t < c.T; ++t) *lse.row(place, t) = log_sum(s.data() + t * c.N, c.N);
  }
  return lse;
}

}  // namespace

void softmax_read(const Case& c) {
  Scored in(c, c.packed_keys);
  SlotRows values(c, c.packed_values, c.values, c.V, in.random);
  values.poison_empty(in.m);
  const Wide v = values.wide(), want_lse = lse_of(c, in);
  Wide want_read(c.tokens(c.V));
  for (int64_t place = 0; place < c.places(); ++place) {
    const std::vector<double> s = in.at(c, place);
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t i = 0; i < c.N; ++i) {
        const double p = share(s[size_t(t * c.N + i)], *want_lse.row(place, t));
        if (p != 0) add(p, v.row(place, i), c.V, want_read.row(place, t));
      }
    }
  }
  Tensor read(c.dtype, c.tokens(c.V)), lse(c.stats(), c.tokens(1)), rest(c.stats(), c.tokens(1));
  mk::SoftmaxRead p;
  in.fill(c, p);
  p.V = c.V, p.values = values.view(), p.read = read.view(), p.lse = lse.view(), p.lse_rest = rest.view();
  if (fault == "row") p.K += 1;
  if (fault == "overflow") p.T = std::numeric_limits<int64_t>::max();
  verify(c, "softmax_read", {{"read", &read, &want_read}, {"lse", &lse, &want_lse}}, [&] { MK_CALL(softmax_read, p); });
  if (in.random.one_in(4)) {
    mk::SoftmaxRead bare = p;
    bare.V = 0, bare.values = bare.read = mk::View{};
    verify(c, "softmax_read without values", {{"lse", &lse, &want_lse}}, [&] { MK_CALL(softmax_read, bare); });
  }
  if (c.T * c.N == 0) return;

  const Tensor saved_read(c.dtype, want_read), saved_lse(c.stats(), want_lse);
  const Tensor saved_rest = rest_of(want_lse, saved_lse);
  const Tensor d_read = uniform(c.dtype, c.tokens(c.V), in.random, -1, 1);
  const Tensor d_lse = in.random.one_in(2) ? uniform(c.stats(), c.tokens(1), in.random, -1, 1) : Tensor();
  const Wide r = saved_read.wide(), dr = d_read.wide(), dl = d_lse.wide();
  Wide want_dq = gradient(in.random, c.tokens(c.K)), want_dk = in.keys.gradient(in.random);
  Wide want_dv = values.gradient(in.random), want_dm = gradient(in.random, in.mask);
  const ScoreGradients sum{&in.q, &in.k, &want_dq, &want_dk, &want_dm, in.scale};
  for (int64_t place = 0; place < c.places(); ++place) {
    const std::vector<double> s = in.at(c, place);
    for (int64_t t = 0; t < c.T; ++t) {
      const double* g = dr.row(place, t);
      const double delta = dot(g, r.row(place, t), c.V) - (dl ? *dl.row(place, t) : 0);
      for (int64_t i = 0; i < c.N; ++i) {
        const double w = share(s[size_t(t * c.N + i)], *want_lse.row(place, t));
        if (w == 0) continue;
        sum.add_score(place, t, i, w * (dot(g, v.row(place, i), c.V) - delta));
        if (want_dv) add(w, g, c.V, want_dv.row(place, i));
      }
    }
  }
  Tensor dq(c.stats(), want_dq), dk(c.stats(), want_dk), dv(c.stats(), want_dv), dm(c.stats(), want_dm);
  mk::SoftmaxReadBackward b{p, d_read.view(), d_lse.view(), dq.view(), dk.view(), dv.view(), dm.view()};
  b.forward.read = saved_read.view(), b.forward.lse = saved_lse.view(), b.forward.lse_rest = saved_rest.view();
  verify(
      c, "softmax_read_backward",
      {{"d_query", &dq, &want_dq}, {"d_keys", &dk, &want_dk}, {"d_values", &dv, &want_dv}, {"d_mask", &dm, &want_dm}},
      [&] { MK_CALL(softmax_read_backward, b); });
}

void additive_read(const Case& c) {
  Scored in(c);
  Tensor values = uniform(c.content, c.of(c.values, c.N, c.V), in.random, -1, 1, c.gap);
  poison_empty(in.m, values);
  const Tensor vector = uniform(c.dtype, c.of(in.random.one_in(2) ? c.keys : 0, 1, c.K), in.random, -1, 1);
  const Wide v = values.wide(), u = vector.wide();
  Wide want_read(c.tokens(c.V)), want_lse(c.tokens(1));
  std::vector<double> s(size_t(c.T * c.N));
  auto hidden = [&](int64_t place, int64_t t, int64_t i, int64_t a) {
    return std::tanh(in.q.row(place, t)[a] + in.k.row(place, i)[a]);
  };
  auto score = [&](int64_t place) {
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t i = 0; i < c.N; ++i) {
        double& x = s[size_t(t * c.N + i)];
        x = in.m ? *in.m.row(place, i) : 0;
        for (int64_t a = 0; x != -kInfinity && a < c.K; ++a) x += u.row(place, 0)[a] * hidden(place, t, i, a);
      }
    }
    close(c, in.ends, place, s);
  };
  for (int64_t place = 0; place < c.places(); ++place) {
    score(place);
    for (int64_t t = 0; t < c.T; ++t) {
      const double lse = *want_lse.row(place, t) = log_sum(s.data() + t * c.N, c.N);
      for (int64_t i = 0; i < c.N; ++i) {
        const double p = share(s[size_t(t * c.N + i)], lse);
        if (p != 0) add(p, v.row(place, i), c.V, want_read.row(place, t));
      }
    }
  }
  Tensor read(c.dtype, c.tokens(c.V)), lse(c.stats(), c.tokens(1)), rest(c.stats(), c.tokens(1));
  const mk::AdditiveRead p{c.lead,
                           c.T,
                           c.N,
                           c.K,
                           c.V,
                           in.query.view(),
                           in.keys.view(),
                           values.view(),
                           vector.view(),
                           in.mask.view(),
                           in.range.view(),
                           read.view(),
                           lse.view(),
                           rest.view()};
  verify(c, "additive_read", {{"read", &read, &want_read}, {"lse", &lse, &want_lse}},
         [&] { MK_CALL(additive_read, p); });
  if (c.places() * c.T * c.N == 0) return;

  const Tensor saved_read(c.dtype, want_read), saved_lse(c.stats(), want_lse);
  const Tensor saved_rest = rest_of(want_lse, saved_lse);
  const Tensor d_read = uniform(c.dtype, c.tokens(c.V), in.random, -1, 1, c.gap);
  const Tensor d_lse = in.random.one_in(2) ? Tensor() : uniform(c.stats(), c.tokens(1), in.random, -1, 1);
  const Wide dr = d_read.wide(), dl = d_lse.wide();
  Wide dq = gradient(in.random, c.tokens(c.K)), dk = in.keys.gradient(in.random);
  Wide dv = gradient(in.random, values.layout()), du = gradient(in.random, vector.layout());
  Wide dm = gradient(in.random, in.mask);
  for (int64_t place = 0; place < c.places(); ++place) {
    score(place);
    for (int64_t t = 0; t < c.T; ++t) {
      const double delta = dot(dr.row(place, t), want_read.row(place, t), c.V) - (dl ? *dl.row(place, t) : 0);
      for (int64_t i = 0; i < c.N; ++i) {
        const double w = share(s[size_t(t * c.N + i)], *want_lse.row(place, t));
        if (w == 0) continue;
        const double ds = w * (dot(dr.row(place, t), v.row(place, i), c.V) - delta);
        if (dv) add(w, dr.row(place, t), c.V, dv.row(place, i));
        if (dm) *dm.row(place, i) += ds;
        for (int64_t a = 0; a < c.K; ++a) {
          const double h = hidden(place, t, i, a), g = ds * u.row(place, 0)[a] * (1 - h * h);
          if (dq) dq.row(place, t)[a] += g;
          if (dk) dk.row(place, i)[a] += g;
          if (du) du.row(place, 0)[a] += ds * h;
        }
      }
    }
  }
  Tensor d_query(c.stats(), dq), d_keys(c.stats(), dk), d_values(c.stats(), dv), d_vector(c.stats(), du);
  Tensor d_mask(c.stats(), dm);
  mk::AdditiveReadBackward b{
      p, d_read.view(), d_lse.view(), d_query.view(), d_keys.view(), d_values.view(), d_vector.view(), d_mask.view()};
  b.forward.read = saved_read.view(), b.forward.lse = saved_lse.view(), b.forward.lse_rest = saved_rest.view();
  verify(c, "additive_read_backward",
         {{"d_query", &d_query, &dq},
          {"d_keys", &d_keys, &dk},
          {"d_values", &d_values, &dv},
          {"d_vector", &d_vector, &du},
          {"d_mask", &d_mask, &dm}},
         [&] { MK_CALL(additive_read_backward, b); });
}

void address(const Case& c) {
  if (c.T * c.N == 0) return;
  Scored in(c);
  const bool sigmoid = in.random.one_in(2);
  const Wide l = sigmoid ? Wide() : lse_of(c, in);
  const Tensor lse(c.stats(), l), rest = rest_of(l, lse);
  Wide want(c.tokens(c.N));
  for (int64_t place = 0; place < c.places(); ++place) {
    const std::vector<double> s = in.at(c, place);
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t i = 0; i < c.N; ++i) {
        const double x = s[size_t(t * c.N + i)];
        want.row(place, t)[i] = sigmoid ? 1 / (1 + std::exp(-x)) : share(x, *l.row(place, t));
      }
    }
  }
  Tensor weights(c.dtype, c.tokens(c.N));
  mk::Address p;
  in.fill(c, p);
  p.lse = lse.view(), p.lse_rest = rest.view(), p.weights = weights.view(), p.sigmoid = sigmoid;
  verify(c, "address", {{"weights", &weights, &want}}, [&] { MK_CALL(address, p); });

  const Tensor saved(c.dtype, want), d_weights = uniform(c.dtype, c.tokens(c.N), in.random, -1, 1);
  const Wide w = saved.wide(), dw = d_weights.wide();
  Wide want_dq = gradient(in.random, c.tokens(c.K)), want_dk = in.keys.gradient(in.random);
  Wide want_dm = gradient(in.random, in.mask);
  const ScoreGradients sum{&in.q, &in.k, &want_dq, &want_dk, &want_dm, in.scale};
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      const double *x = w.row(place, t), *g = dw.row(place, t);
      const double mean = dot(x, g, c.N);
      for (int64_t i = 0; i < c.N; ++i) {
        if (x[i] != 0) sum.add_score(place, t, i, sigmoid ? g[i] * x[i] * (1 - x[i]) : x[i] * (g[i] - mean));
      }
    }
  }
  Tensor dq(c.stats(), want_dq), dk(c.stats(), want_dk), dm(c.stats(), want_dm);
  mk::AddressBackward b{p, d_weights.view(), dq.view(), dk.view(), dm.view()};
  b.forward.weights = saved.view();
  verify(c, "address_backward", {{"d_query", &dq, &want_dq}, {"d_keys", &dk, &want_dk}, {"d_mask", &dm, &want_dm}},
         [&] { MK_CALL(address_backward, b); });
}

void slot_usage(const Case& c) {
  if (c.T * c.N == 0) return;
  Scored in(c);
  const Tensor lse(c.stats(), lse_of(c, in)), d_usage = uniform(c.stats(), c.slots(1), in.random, -1, 1);
  const Wide l = lse.wide(), g = d_usage.wide();
  Wide want(c.slots(1));
  Wide want_dq = gradient(in.random, c.tokens(c.K)), want_dk = in.keys.gradient(in.random);
  Wide want_dl = gradient(in.random, c.tokens(1)), want_dm = gradient(in.random, in.mask);
  const ScoreGradients sum{&in.q, &in.k, &want_dq, &want_dk, &want_dm, in.scale};
  for (int64_t place = 0; place < c.places(); ++place) {
    const std::vector<double> s = in.at(c, place);
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t i = 0; i < c.N; ++i) {
        const double w = share(s[size_t(t * c.N + i)], *l.row(place, t)), ds = w * *g.row(place, i);
        if (w == 0) continue;
        *want.row(place, i) += w;
        sum.add_score(place, t, i, ds);
        if (want_dl) *want_dl.row(place, t) -= ds;
      }
    }
  }
  Tensor usage(c.stats(), c.slots(1));
  mk::SlotUsage p;
  in.fill(c, p);
  p.lse = lse.view(), p.usage = usage.view();
  verify(c, "slot_usage", {{"usage", &usage, &want}}, [&] { MK_CALL(slot_usage, p); });

  Tensor dq(c.stats(), want_dq), dk(c.stats(), want_dk), dl(c.stats(), want_dl), dm(c.stats(), want_dm);
  const mk::SlotUsageBackward b{p, d_usage.view(), dq.view(), dk.view(), dl.view(), dm.view()};
  verify(c, "slot_usage_backward",
         {{"d_query", &dq, &want_dq}, {"d_keys", &dk, &want_dk}, {"d_lse", &dl, &want_dl}, {"d_mask", &dm, &want_dm}},
         [&] { MK_CALL(slot_usage_backward, b); });
}

namespace {
FAMILY(softmax_read)
FAMILY(additive_read)
FAMILY(address)
FAMILY(slot_usage)
}  // namespace

}  // namespace native
