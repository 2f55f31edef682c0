// gated_write, softmax_write and slot_write: the closed form, the scan and the write in place.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "params/gated_write.h"

namespace native {
namespace {

constexpr double kErase[] = {1, 0, 0.375};

struct Written {
  mk::Gate kind;
  Random random;
  double scale, erase_scale = 1;
  bool vector;
  Tensor values, keys, query, write, erase, mask, token_mask, weights;
  Wide v, k, q, w, e, m, live, a;

  Written(const Case& c, mk::Gate gate) : kind(gate), random(c.seed), scale(3 / std::sqrt(double(c.K))) {
    const int64_t form = random.below(4);
    vector = form == 3;
    if (!vector) erase_scale = kErase[form];
    auto side = [&] { return random.one_in(3) ? c.query : c.all; };
    values = uniform(c.content, c.of(c.values, c.N, c.V), random, -1, 1, c.gap);
    keys = uniform(c.dtype, c.of(c.keys, c.N, c.K), random, -1, 1, c.gap);
    query = uniform(c.dtype, c.of(c.query, c.T, c.K), random, -1, 1, c.gap);
    write = uniform(c.content, c.of(side(), c.T, c.V), random, -1, 1, c.gap);
    if (vector) erase = uniform(c.content, c.of(side(), c.T, c.V), random, 0, 1, c.gap);
    // Gates that are nearly closed let early tokens show in the result.
    if (kind == mk::Gate::given) weights = uniform(c.dtype, c.of(side(), c.T, c.N), random, 0, 1, c.gap);
    else mask = slot_mask(c, random, random.one_in(2) ? -4 : 0);
    if (random.one_in(2)) {
      Wide x(c.of(side(), c.T, 1));
      for (double& on : x.all()) on = random.one_in(3) ? -kInfinity : 0;
      token_mask = Tensor(DType::boolean, x);
    }
    m = mask.wide();
    poison_empty(m, keys);
    v = values.wide(), k = keys.wide(), q = query.wide(), w = write.wide(), e = erase.wide(), live = token_mask.wide();
    fill_gates(c);
  }
  bool writes(int64_t place, int64_t t) const { return !live || *live.row(place, t) == 0; }
  double erased(int64_t place, int64_t t, int64_t x) const { return e ? e.row(place, t)[x] : erase_scale; }
  // All gates, [T, N] per place.
  void fill_gates(const Case& c) {
    a = Wide(c.of(c.all, c.T, c.N));
    const Wide given = weights.wide();
    for (int64_t place = 0; place < c.places(); ++place) {
      for (int64_t t = 0; t < c.T; ++t) {
        double* row = a.row(place, t);
        double top = -kInfinity, total = 0;
        for (int64_t i = 0; i < c.N; ++i) {
          const double mi = m ? *m.row(place, i) : 0;
          row[i] = given ? given.row(place, t)[i] : mi;
          if (given || mi == -kInfinity) continue;
          row[i] += scale * dot(q.row(place, t), k.row(place, i), c.K);
          top = std::max(top, row[i]);
        }
        if (kind == mk::Gate::given) continue;
        for (int64_t i = 0; i < c.N; ++i) {
          if (row[i] == -kInfinity) row[i] = 0;
          else row[i] = kind == mk::Gate::sigmoid ? 1 / (1 + std::exp(-row[i])) : std::exp(row[i] - top);
          total += row[i];
        }
        for (int64_t i = 0; i < c.N && kind == mk::Gate::softmax && total > 0; ++i) row[i] /= total;
      }
    }
  }
  double gate(int64_t place, int64_t t, int64_t i) const { return a.row(place, t)[i]; }
};

struct Gradients {
  Wide values, keys, query, write, erase, mask, weights;
  Wide gates;  // of every gate, [T, N] per place
};

// One slot through all tokens of its memory and, with `d`, back.
void one_slot(const Case& c, const Written& in, const std::vector<int64_t>& places, int64_t i, Wide& out,
              Wide& retained, const Wide& d_out, const Wide& d_retained, Gradients* d) {
  const int64_t here = places[0];
  double* v = out.row(here, i);
  double kept = 1;
  std::vector<double> gates, before;
  std::copy_n(in.v.row(here, i), c.V, v);
  for (int64_t place : places) {
    for (int64_t t = 0; t < c.T; ++t) {
      const double a = in.writes(place, t) ? in.gate(place, t, i) : 0;
      gates.push_back(a);
      kept *= 1 - a;
      if (d != nullptr) before.insert(before.end(), v, v + c.V);
      for (int64_t x = 0; x < c.V; ++x) v[x] = v[x] * (1 - a * in.erased(place, t, x)) + a * in.w.row(place, t)[x];
    }
  }
  *retained.row(here, i) = kept;
  if (d == nullptr) return;
  std::vector<double> g(d_out.row(here, i), d_out.row(here, i) + c.V);
  const double through = d_retained ? *d_retained.row(here, i) * kept : 0;
  for (size_t n = gates.size(); n-- > 0;) {
    const int64_t place = places[n / size_t(c.T)], t = int64_t(n) % c.T;
    const double a = gates[n], *old = before.data() + int64_t(n) * c.V;
    if (!in.writes(place, t) || (a == 0 && in.kind != mk::Gate::given)) continue;
    double da = 0;
    for (int64_t x = 0; x < c.V; ++x) {
      const double erase = in.erased(place, t, x);
      da += g[size_t(x)] * (in.w.row(place, t)[x] - erase * old[x]);
      if (d->write) d->write.row(place, t)[x] += a * g[size_t(x)];
      if (d->erase) d->erase.row(place, t)[x] -= a * g[size_t(x)] * old[x];
      g[size_t(x)] *= 1 - a * erase;
    }
    // A softmax saturated at 1 has no other slots, and no gradient of a score.
    d->gates.row(place, t)[i] = da - (through != 0 ? through / (1 - a) : 0);
  }
  if (d->values) add(1, g.data(), c.V, d->values.row(here, i));
}

// From the gradients of gates to those of scores, or of the weights.
void through_gates(const Case& c, const Written& in, Gradients& d) {
  const ScoreGradients sum{&in.q, &in.k, &d.query, &d.keys, &d.mask, in.scale};
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      const double *a = in.a.row(place, t), *da = d.gates.row(place, t), delta = dot(a, da, c.N);
      for (int64_t i = 0; i < c.N; ++i) {
        if (in.kind == mk::Gate::given && d.weights) d.weights.row(place, t)[i] += da[i];
        if (in.kind == mk::Gate::given || a[i] == 0) continue;
        sum.add_score(place, t, i, a[i] * (in.kind == mk::Gate::sigmoid ? (1 - a[i]) * da[i] : da[i] - delta));
      }
    }
  }
}

void call(const Written& in, const mk::GatedWrite& p) {
  if (in.vector) MK_CALL(gated_write_scan, p);
  else MK_CALL(gated_write, p);
}

void run(const Case& c, mk::Gate kind, const std::string& op) {
  if (c.N == 0) return;
  Written in(c, kind);
  const auto all = memories(c);
  Wide want(c.slots(c.V)), want_retained(c.slots(1)), none;
  auto each_slot = [&](const Wide& d_out, const Wide& d_retained, Gradients* d) {
    for (const auto& places : all) {
      for (int64_t i = 0; i < c.N; ++i) one_slot(c, in, places, i, want, want_retained, d_out, d_retained, d);
    }
  };
  each_slot(none, none, nullptr);
  const std::string name = in.vector ? op + " scan" : op;
  const bool given = kind == mk::Gate::given;
  Tensor out(c.content, c.slots(c.V)), retained(c.stats(), c.slots(1));
  mk::GatedWrite p{c.lead,
                   c.T,
                   c.N,
                   given ? 0 : c.K,
                   c.V,
                   in.values.view(),
                   given ? in.values.view() : in.keys.view(),
                   given ? mk::View{} : in.query.view(),
                   in.write.view(),
                   in.erase.view(),
                   in.mask.view(),
                   in.token_mask.view(),
                   out.view(),
                   retained.view(),
                   in.scale,
                   in.erase_scale,
                   kind,
                   in.weights.view()};
  verify(c, name.c_str(), {{"values", &out, &want}, {"retained", &retained, &want_retained}}, [&] { call(in, p); });
  if (c.values == c.memory && in.random.one_in(2)) {
    Tensor own(c.content, in.v, c.gap);
    mk::GatedWrite here = p;
    here.values = here.out = own.view();
    verify(c, (op + " in place").c_str(), {{"values", &own, &want}, {"retained", &retained, &want_retained}}, [&] {
      own.assign(in.v);
      call(in, here);
    });
  }

  const Tensor saved(c.stats(), want_retained), d_out = uniform(c.content, c.slots(c.V), in.random, -1, 1);
  const Tensor d_retained = in.random.one_in(2) && !given ? uniform(c.stats(), c.slots(1), in.random, -1, 1) : Tensor();
  Gradients d;
  d.values = gradient(in.random, in.values.layout());
  d.gates = Wide(c.of(c.all, c.T, c.N));
  if (given) d.weights = gradient(in.random, c.tokens(c.N));
  if (c.T > 0 && !given) d.keys = gradient(in.random, in.keys.layout()), d.mask = gradient(in.random, in.mask);
  if (!given) d.query = gradient(in.random, c.tokens(c.K));
  d.write = gradient(in.random, c.tokens(c.V));
  if (in.vector) d.erase = gradient(in.random, c.tokens(c.V));
  each_slot(d_out.wide(), d_retained.wide(), &d);
  through_gates(c, in, d);
  Tensor dv(c.stats(), d.values), dk(c.stats(), d.keys), dq(c.stats(), d.query), dw(c.stats(), d.write);
  Tensor de(c.stats(), d.erase), dm(c.stats(), d.mask), da(c.dtype, d.weights);
  mk::GatedWriteBackward b{p,         d_out.view(), d_retained.view(), dv.view(), dk.view(),
                           dq.view(), dw.view(),    de.view(),         dm.view(), da.view()};
  b.forward.retained = saved.view(), b.forward.out = mk::View{};
  verify(c, (name + " backward").c_str(),
         {{"d_values", &dv, &d.values},
          {"d_keys", &dk, &d.keys},
          {"d_query", &dq, &d.query},
          {"d_write", &dw, &d.write},
          {"d_erase", &de, &d.erase},
          {"d_mask", &dm, &d.mask},
          {"d_weights", &da, &d.weights}},
         [&] {
           if (in.vector) MK_CALL(gated_write_scan_backward, b);
           else MK_CALL(gated_write_backward, b);
         });
}

}  // namespace

void gated_write(const Case& c) { run(c, mk::Gate::sigmoid, "gated_write"); }
void softmax_write(const Case& c) { run(c, mk::Gate::softmax, "softmax_write"); }
void slot_write(const Case& c) { run(c, mk::Gate::given, "slot_write"); }

namespace {
FAMILY(gated_write)
FAMILY(softmax_write)
FAMILY(slot_write)
}  // namespace

}  // namespace native
