// cache_logprobs and cache_nll: a distribution over words, mixed with that of a cache. There are as many words as the
// case has value columns, and as many entries as it has slots. Every leading dimension belongs to the tokens.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "params/cache_mix.h"

namespace native {
namespace {

struct Mixed {
  Case c;
  Random random;
  Tensor logits, scores, tokens, mix, lse, rest;
  Wide z, s, y, m, l;

  explicit Mixed(const Case& grid) : c(grid), random(grid.seed) {
    std::fill_n(c.lead.shared, c.lead.rank, true);
    const Layout entries = c.of(c.query, c.T, c.N);
    logits = uniform(c.dtype, c.tokens(c.V), random, -4, 4, c.gap);
    z = logits.wide();
    s = uniform(c.content, entries, random, -3, 3).wide();
    y = Wide(entries);
    const int64_t rarity = random.one_in(4) ? 1 : 4;  // now and then every entry is empty
    for (double& x : s.all()) x = random.one_in(rarity) ? -kInfinity : x;
    for (double& x : y.all()) x = double(random.below(c.V + 1) - 1);
    scores = Tensor(c.content, s, c.gap), tokens = Tensor(DType::i64, y, c.gap);
    mix = uniform(c.stats(), c.tokens(1), random, 0.1, 0.9);
    m = mix.wide();
    l = Wide(c.tokens(1));
    for (int64_t place = 0; place < c.places(); ++place) {
      for (int64_t t = 0; t < c.T; ++t) {
        double sum = 0;
        for (int64_t w = 0; w < c.V; ++w) sum += std::exp(z.row(place, t)[w]);
        *l.row(place, t) = std::log(sum);
      }
    }
    lse = Tensor(c.stats(), l), rest = rest_of(l, lse);
  }
  mk::CacheMix params(const Tensor& lse, const Tensor& rest) const {
    return {c.lead, c.T, c.V, c.N, logits.view(), scores.view(), tokens.view(), mix.view(), lse.view(), rest.view()};
  }
  bool empty(int64_t place, int64_t t, int64_t j) const {
    return y.row(place, t)[j] < 0 || s.row(place, t)[j] == -kInfinity;
  }
  // Softmax over the entries of a token; false if all are empty.
  bool shares(int64_t place, int64_t t, std::vector<double>& share) const {
    double total = 0;
    share.assign(size_t(c.N), 0);
    for (int64_t j = 0; j < c.N; ++j) total += share[size_t(j)] = empty(place, t, j) ? 0 : std::exp(s.row(place, t)[j]);
    for (double& x : share) x = total == 0 ? 0 : x / total;
    return total != 0;
  }
  double own(int64_t place, int64_t t, int64_t w) const { return std::exp(z.row(place, t)[w] - *l.row(place, t)); }
};

// The gradients that follow from those of p[w].
struct MixedGradients {
  Wide want_z, want_c, want_m;
  Tensor z, s, m;

  explicit MixedGradients(Mixed& in)
      : want_z(gradient(in.random, in.c.tokens(in.c.V))),
        want_c(gradient(in.random, in.c.tokens(in.c.N))),
        want_m(gradient(in.random, in.c.tokens(1))),
        z(in.c.stats(), want_z),
        s(in.c.stats(), want_c),
        m(in.c.stats(), want_m) {}
  void add(const Mixed& in, int64_t place, int64_t t, const std::vector<double>& dp, const std::vector<double>& share,
           bool any) {
    const double mix = any ? *in.m.row(place, t) : 0, *word = in.y.row(place, t);
    double own_mean = 0, cache_mean = 0, d_mix = 0;
    for (int64_t w = 0; w < in.c.V; ++w) own_mean += dp[size_t(w)] * in.own(place, t, w);
    for (int64_t j = 0; j < in.c.N; ++j)
      cache_mean += share[size_t(j)] == 0 ? 0 : share[size_t(j)] * dp[size_t(word[j])];
    d_mix = any ? cache_mean - own_mean : 0;
    for (int64_t w = 0; want_z && w < in.c.V; ++w) {
      want_z.row(place, t)[w] = (1 - mix) * in.own(place, t, w) * (dp[size_t(w)] - own_mean);
    }
    for (int64_t j = 0; want_c && j < in.c.N; ++j) {
      if (share[size_t(j)] != 0) want_c.row(place, t)[j] = mix * share[size_t(j)] * (dp[size_t(word[j])] - cache_mean);
    }
    if (want_m) *want_m.row(place, t) = d_mix;
  }
  mk::CacheGradients views() const { return {z.view(), s.view(), m.view()}; }
};

}  // namespace

void cache_logprobs(const Case& grid) {
  Mixed in(grid);
  const Case& c = in.c;
  const Tensor d_out = uniform(c.stats(), c.tokens(c.V), in.random, -1, 1, c.gap);
  const Wide d = d_out.wide();
  Wide want(c.tokens(c.V));
  MixedGradients g(in);
  std::vector<double> share, dp(size_t(c.V)), p(size_t(c.V));
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      const bool any = in.shares(place, t, share);
      const double mix = any ? *in.m.row(place, t) : 0;
      for (int64_t w = 0; w < c.V; ++w) p[size_t(w)] = (1 - mix) * in.own(place, t, w);
      for (int64_t j = 0; j < c.N; ++j) {
        if (share[size_t(j)] != 0) p[size_t(in.y.row(place, t)[j])] += mix * share[size_t(j)];
      }
      for (int64_t w = 0; w < c.V; ++w) {
        want.row(place, t)[w] = std::log(p[size_t(w)]);
        dp[size_t(w)] = d.row(place, t)[w] / p[size_t(w)];
      }
      g.add(in, place, t, dp, share, any);
    }
  }
  Tensor out(c.stats(), c.tokens(c.V)), lse(c.stats(), c.tokens(1)), rest(c.stats(), c.tokens(1));
  const mk::CacheLogprobs f{in.params(lse, rest), out.view()};
  verify(c, "cache_logprobs", {{"logprobs", &out, &want}, {"lse", &lse, &in.l}}, [&] { MK_CALL(cache_logprobs, f); });
  const mk::CacheLogprobsBackward b{in.params(in.lse, in.rest), d_out.view(), g.views()};
  verify(c, "cache_logprobs_backward",
         {{"d_logits", &g.z, &g.want_z}, {"d_scores", &g.s, &g.want_c}, {"d_mix", &g.m, &g.want_m}},
         [&] { MK_CALL(cache_logprobs_backward, b); });
}

namespace {

// lse, the largest probability and the entropy of the logits of every token, and what their gradients add to those of
// the logits.
struct Stats {
  Wide largest, entropy, d_lse, d_largest, d_entropy;
  Tensor got_largest, got_entropy, saved, of_lse, of_largest, of_entropy;

  Stats(Mixed& in, MixedGradients& g) {
    const Case& c = in.c;
    for (Wide* x : {&largest, &entropy}) *x = Wide(c.tokens(1));
    const auto drawn = [&](Wide& wide) {
      Tensor d = uniform(c.stats(), c.tokens(1), in.random, -1, 1);
      wide = d.wide();
      return d;
    };
    of_lse = drawn(d_lse), of_largest = drawn(d_largest), of_entropy = drawn(d_entropy);
    for (int64_t place = 0; place < c.places(); ++place) {
      for (int64_t t = 0; t < c.T; ++t) add(in, g, place, t);
    }
    got_largest = Tensor(c.stats(), c.tokens(1)), got_entropy = Tensor(c.stats(), c.tokens(1));
    saved = Tensor(c.stats(), entropy);
  }
  void add(const Mixed& in, MixedGradients& g, int64_t place, int64_t t) {
    const double* z = in.z.row(place, t);
    double &top = *largest.row(place, t), &h = *entropy.row(place, t), ties = 0, highest = -kInfinity;
    for (int64_t w = 0; w < in.c.V; ++w) {
      const double q = in.own(place, t, w);
      top = std::max(top, q), highest = std::max(highest, z[w]), h -= q * std::log(q);
    }
    for (int64_t w = 0; w < in.c.V; ++w) ties += z[w] == highest;
    for (int64_t w = 0; g.want_z && w < in.c.V; ++w) {
      const double q = in.own(place, t, w), log_q = std::log(q);
      g.want_z.row(place, t)[w] += *d_lse.row(place, t) * q - *d_entropy.row(place, t) * q * (log_q + h) +
                                   *d_largest.row(place, t) * top * ((z[w] == highest ? 1 / ties : 0) - q);
    }
  }
};

}  // namespace

void cache_nll(const Case& grid) {
  Mixed in(grid);
  const Case& c = in.c;
  Wide y(c.tokens(1));
  for (double& x : y.all()) x = double(in.random.below(c.V + 1) - 1);
  const Tensor targets(DType::i64, y, c.gap), d_out = uniform(c.stats(), c.tokens(1), in.random, -1, 1);
  const Wide d = d_out.wide();
  Wide want(c.tokens(1));
  MixedGradients g(in);
  std::vector<double> share, dp(size_t(c.V));
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      const bool any = in.shares(place, t, share);
      const double mix = any ? *in.m.row(place, t) : 0;
      const auto target = int64_t(*y.row(place, t));
      if (target < 0) continue;
      double p = (1 - mix) * in.own(place, t, target);
      for (int64_t j = 0; j < c.N; ++j) p += int64_t(in.y.row(place, t)[j]) == target ? mix * share[size_t(j)] : 0;
      *want.row(place, t) = -std::log(p);
      std::fill(dp.begin(), dp.end(), 0);
      dp[size_t(target)] = -*d.row(place, t) / p;
      g.add(in, place, t, dp, share, any);
    }
  }
  Tensor out(c.stats(), c.tokens(1)), lse(c.stats(), c.tokens(1)), rest(c.stats(), c.tokens(1));
  Stats s(in, g);
  const mk::CacheNll f{in.params(lse, rest), targets.view(),      out.view(), true,
                       s.got_largest.view(), s.got_entropy.view()};
  verify(c, "cache_nll",
         {{"nll", &out, &want},
          {"lse", &lse, &in.l},
          {"largest", &s.got_largest, &s.largest},
          {"entropy", &s.got_entropy, &s.entropy}},
         [&] { MK_CALL(cache_nll, f); });
  const mk::CacheNllBackward b{
      in.params(in.lse, in.rest), targets.view(),      s.saved.view(), d_out.view(), s.of_lse.view(),
      s.of_largest.view(),        s.of_entropy.view(), g.views()};
  verify(c, "cache_nll_backward",
         {{"d_logits", &g.z, &g.want_z}, {"d_scores", &g.s, &g.want_c}, {"d_mix", &g.m, &g.want_m}},
         [&] { MK_CALL(cache_nll_backward, b); });
}

namespace {
FAMILY(cache_logprobs)
FAMILY(cache_nll)
}  // namespace

}  // namespace native
