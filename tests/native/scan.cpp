// gated_scan, cell_scan and memory_scan: recurrences over the tokens, and back.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "params/cell_scan.h"
#include "params/gated_scan.h"
#include "params/memory_scan.h"

namespace native {
namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// The grid has more sizes of memory than a scan without slots needs.
bool worth_a_run(const Case& c) { return c.T > 0 && (c.N == 1 || c.N == 64); }

// The state before token t of a place, from the states that a kernel saved.
std::vector<double> before(const Wide& states, const Wide& initial, int64_t place, int64_t t, int64_t D) {
  std::vector<double> h(static_cast<size_t>(D));
  if (t > 0) std::copy_n(states.row(place, t - 1), D, h.begin());
  else if (initial) std::copy_n(initial.row(place, 0), D, h.begin());
  return h;
}

}  // namespace

// No argument is memory, so every leading dimension is shared.
void gated_scan(const Case& grid) {
  if (!worth_a_run(grid)) return;
  Case c = grid;
  Random random(c.seed);
  std::fill_n(c.lead.shared, c.lead.rank, true);
  const int64_t D = c.V;
  c.T *= random.one_in(2) ? 1 : 17;  // long enough that tokens are cut too
  const Tensor forget = uniform(c.dtype, c.of(c.query, c.T, D), random, 0, 1, c.gap);
  const Tensor update = uniform(c.content, c.of(c.all, c.T, D), random, -1, 1, c.gap);
  const Tensor initial = random.one_in(2) ? uniform(c.content, c.of(c.keys, 1, D), random, -1, 1) : Tensor();
  const Tensor d_states = uniform(c.content, c.tokens(D), random, -1, 1);
  const Wide f = forget.wide(), u = update.wide(), first = initial.wide(), dh = d_states.wide();
  Wide want(c.tokens(D));
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      const std::vector<double> h = before(want, first, place, t, D);
      for (int64_t d = 0; d < D; ++d) want.row(place, t)[d] = f.row(place, t)[d] * h[size_t(d)] + u.row(place, t)[d];
    }
  }
  Tensor states(c.content, c.tokens(D));
  const mk::GatedScan p{c.lead, c.T, D, forget.view(), update.view(), initial.view(), states.view()};
  verify(c, "gated_scan", {{"states", &states, &want}}, [&] { MK_CALL(gated_scan, p); });

  const Tensor saved(c.content, want);
  const Wide known = saved.wide();
  Wide want_df = gradient(random, c.tokens(D)), want_du = gradient(random, c.tokens(D));
  Wide want_d0 = initial ? gradient(random, c.of(c.all, 1, D)) : Wide();
  for (int64_t place = 0; place < c.places(); ++place) {
    std::vector<double> g(static_cast<size_t>(D));
    for (int64_t t = c.T; t-- > 0;) {
      const std::vector<double> h = before(known, first, place, t, D);
      for (int64_t d = 0; d < D; ++d) {
        g[size_t(d)] += dh.row(place, t)[d];
        if (want_df) want_df.row(place, t)[d] = g[size_t(d)] * h[size_t(d)];
        if (want_du) want_du.row(place, t)[d] = g[size_t(d)];
        g[size_t(d)] *= f.row(place, t)[d];
      }
    }
    if (want_d0) std::copy(g.begin(), g.end(), want_d0.row(place, 0));
  }
  Tensor df(c.stats(), want_df), du(c.stats(), want_du), d0(c.stats(), want_d0);
  mk::GatedScanBackward b{p, d_states.view(), df.view(), du.view(), d0.view()};
  b.forward.states = saved.view();
  verify(c, "gated_scan_backward",
         {{"d_forget", &df, &want_df}, {"d_update", &du, &want_du}, {"d_initial", &d0, &want_d0}},
         [&] { MK_CALL(gated_scan_backward, b); });
}

// The weight is the memory: it has the leading dimensions of the keys.
void cell_scan(const Case& grid) {
  if (!worth_a_run(grid)) return;
  Case c = grid;
  Random random(c.seed);
  for (int d = 0; d < c.lead.rank; ++d) c.lead.shared[d] = (c.keys >> d & 1) == 0;
  const int64_t D = c.V;
  const double size = 1 / std::sqrt(double(D));
  const Tensor inputs = uniform(c.dtype, c.of(c.all, c.T, 3 * D), random, -2, 2, c.gap);
  const Tensor weight = uniform(c.dtype, c.of(c.keys, 3 * D, D), random, -size, size, c.gap);
  const Tensor initial = random.one_in(2) ? uniform(c.dtype, c.of(c.query, 1, D), random, -1, 1) : Tensor();
  const Tensor d_states = uniform(c.dtype, c.tokens(D), random, -1, 1);
  const Wide x = inputs.wide(), w = weight.wide(), first = initial.wide(), dh = d_states.wide();
  // The gates f, i, c of a token from the state before it.
  auto gates = [&](int64_t place, int64_t t, const std::vector<double>& h) {
    std::vector<double> z(size_t(3 * D));
    for (int64_t r = 0; r < 3 * D; ++r) {
      const double sum = x.row(place, t)[r] + dot(w.row(place, r), h.data(), D);
      z[size_t(r)] = r < 2 * D ? sigmoid(sum) : std::tanh(sum);
    }
    return z;
  };
  Wide want(c.tokens(D));
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      const std::vector<double> h = before(want, first, place, t, D), z = gates(place, t, h);
      for (int64_t d = 0; d < D; ++d)
        want.row(place, t)[d] = z[size_t(d)] * h[size_t(d)] + z[size_t(D + d)] * z[size_t(2 * D + d)];
    }
  }
  Tensor states(c.dtype, c.tokens(D));
  const mk::CellScan p{c.lead, c.T, D, inputs.view(), weight.view(), initial.view(), states.view()};
  verify(c, "cell_scan", {{"states", &states, &want}}, [&] { MK_CALL(cell_scan, p); });

  const Tensor saved(c.dtype, want);
  const Wide known = saved.wide();
  Wide want_dx = gradient(random, c.tokens(3 * D)), want_dw = gradient(random, weight.layout());
  Wide want_d0 = initial ? gradient(random, c.of(c.all, 1, D)) : Wide();
  for (int64_t place = 0; place < c.places(); ++place) {
    std::vector<double> g(static_cast<size_t>(D)), dz(size_t(3 * D));
    for (int64_t t = c.T; t-- > 0;) {
      const std::vector<double> h = before(known, first, place, t, D), z = gates(place, t, h);
      for (int64_t d = 0; d < D; ++d) {
        const double f = z[size_t(d)], i = z[size_t(D + d)], n = z[size_t(2 * D + d)];
        const double all = g[size_t(d)] + dh.row(place, t)[d];
        dz[size_t(d)] = all * h[size_t(d)] * f * (1 - f);
        dz[size_t(D + d)] = all * n * i * (1 - i);
        dz[size_t(2 * D + d)] = all * i * (1 - n * n);
        g[size_t(d)] = all * f;
      }
      if (want_dx) std::copy(dz.begin(), dz.end(), want_dx.row(place, t));
      for (int64_t r = 0; r < 3 * D; ++r) {
        add(dz[size_t(r)], w.row(place, r), D, g.data());
        if (want_dw) add(dz[size_t(r)], h.data(), D, want_dw.row(place, r));
      }
    }
    if (want_d0) std::copy(g.begin(), g.end(), want_d0.row(place, 0));
  }
  Tensor dx(c.stats(), want_dx), dw(c.stats(), want_dw), d0(c.stats(), want_d0);
  mk::CellScanBackward b{p, d_states.view(), dx.view(), dw.view(), d0.view()};
  b.forward.states = saved.view();
  verify(c, "cell_scan_backward",
         {{"d_inputs", &dx, &want_dx}, {"d_weight", &dw, &want_dw}, {"d_initial", &d0, &want_d0}},
         [&] { MK_CALL(cell_scan_backward, b); });
}

namespace {

struct Scan {
  Random random;
  double scale;
  bool read_first;
  Tensor values, keys, read_query, write_query, write, mask, token_mask;
  Wide v, k, rq, wq, w, m, live;
  Wide a, p, lse;  // gates and weights [T, N] of every place

  explicit Scan(const Case& c) : random(c.seed), scale(3 / std::sqrt(double(c.K))), read_first(random.one_in(2)) {
    auto side = [&] { return random.one_in(3) ? c.query : c.all; };
    values = uniform(c.content, c.of(c.values, c.N, c.V), random, -1, 1, c.gap);
    keys = uniform(c.dtype, c.of(c.keys, c.N, c.K), random, -1, 1, c.gap);
    read_query = uniform(c.dtype, c.of(c.query, c.T, c.K), random, -1, 1, c.gap);
    write_query = uniform(c.dtype, c.of(side(), c.T, c.K), random, -1, 1, c.gap);
    write = uniform(c.content, c.of(side(), c.T, c.V), random, -1, 1, c.gap);
    mask = slot_mask(c, random, random.one_in(2) ? -4 : 0);
    if (random.one_in(2)) {
      Wide x(c.of(side(), c.T, 1));
      for (double& on : x.all()) on = random.one_in(3) ? -kInfinity : 0;
      token_mask = Tensor(DType::boolean, x);
    }
    m = mask.wide();
    poison_empty(m, keys);
    v = values.wide(), k = keys.wide(), rq = read_query.wide(), wq = write_query.wide(), w = write.wide();
    live = token_mask.wide();
    a = Wide(c.of(c.all, c.T, c.N)), p = a, lse = Wide(c.tokens(1), -kInfinity);
    for (int64_t place = 0; place < c.places(); ++place) {
      const std::vector<double> reads = scores(c, rq, k, m, scale, place), writes = scores(c, wq, k, m, scale, place);
      for (int64_t t = 0; t < c.T; ++t) {
        double total = 0;
        for (int64_t i = 0; i < c.N; ++i) total += std::exp(reads[size_t(t * c.N + i)]);
        if (!speaks(place, t) || total == 0) continue;
        *lse.row(place, t) = std::log(total);
        for (int64_t i = 0; i < c.N; ++i) {
          a.row(place, t)[i] = sigmoid(writes[size_t(t * c.N + i)]);
          p.row(place, t)[i] = std::exp(reads[size_t(t * c.N + i)]) / total;
        }
      }
    }
  }
  bool speaks(int64_t place, int64_t t) const { return !live || *live.row(place, t) == 0; }
};

struct ScanGradients {
  Wide reads, out;  // those that come in; a missing one is zero
  Wide values, keys, read_query, write_query, write, mask;
};

// Slot i through all tokens of its memory; its part of the reads is added to `reads`. With `d`, back again: `saved` are the reads.
void one_slot(const Case& c, const Scan& in, const std::vector<int64_t>& places, int64_t i, Wide& reads, Wide& out,
              const Wide* saved, ScanGradients* d) {
  std::vector<double> states(in.v.row(places[0], i), in.v.row(places[0], i) + c.V);
  for (int64_t place : places) {
    for (int64_t t = 0; t < c.T; ++t) {
      const double a = in.a.row(place, t)[i], p = in.p.row(place, t)[i];
      const size_t old = states.size() - size_t(c.V);
      for (int64_t x = 0; x < c.V; ++x) states.push_back(states[old + size_t(x)] * (1 - a) + a * in.w.row(place, t)[x]);
      if (d == nullptr && p != 0) add(p, states.data() + old + (in.read_first ? 0 : c.V), c.V, reads.row(place, t));
    }
  }
  if (d == nullptr) {
    std::copy_n(states.end() - c.V, c.V, out.row(places[0], i));
    return;
  }
  std::vector<double> g(static_cast<size_t>(c.V)), none(g);
  if (d->out) std::copy_n(d->out.row(places[0], i), c.V, g.begin());
  const ScoreGradients by_read{&in.rq, &in.k, &d->read_query, &d->keys, &d->mask, in.scale};
  const ScoreGradients by_write{&in.wq, &in.k, &d->write_query, &d->keys, &d->mask, in.scale};
  for (size_t n = places.size() * size_t(c.T); n-- > 0;) {
    const int64_t place = places[n / size_t(c.T)], t = int64_t(n) % c.T;
    const double a = in.a.row(place, t)[i], p = in.p.row(place, t)[i];
    if (p == 0) continue;  // a silent token, or an empty slot
    const double *old = states.data() + int64_t(n) * c.V, *seen = old + (in.read_first ? 0 : c.V);
    const double* dr = d->reads ? d->reads.row(place, t) : none.data();
    const double ds = p * (dot(dr, seen, c.V) - dot(dr, saved->row(place, t), c.V));
    if (!in.read_first) add(p, dr, c.V, g.data());
    double da = 0;
    for (int64_t x = 0; x < c.V; ++x) da += g[size_t(x)] * (in.w.row(place, t)[x] - old[x]);
    if (d->write) add(a, g.data(), c.V, d->write.row(place, t));
    for (double& x : g) x *= 1 - a;
    if (in.read_first) add(p, dr, c.V, g.data());
    by_read.add_score(place, t, i, ds);
    by_write.add_score(place, t, i, da * a * (1 - a));
  }
  if (d->values) add(1, g.data(), c.V, d->values.row(places[0], i));
}

}  // namespace

void memory_scan(const Case& c) {
  if (c.N == 0) return;
  Scan in(c);
  const auto all = memories(c);
  Wide want_reads(c.tokens(c.V)), want(c.slots(c.V));
  for (const auto& places : all) {
    for (int64_t i = 0; i < c.N; ++i) one_slot(c, in, places, i, want_reads, want, nullptr, nullptr);
  }
  Tensor reads(c.dtype, c.tokens(c.V)), out(c.content, c.slots(c.V)), lse(c.stats(), c.tokens(1)),
      rest(c.stats(), c.tokens(1));
  mk::MemoryScan p;
  p.write = {c.lead,
             c.T,
             c.N,
             c.K,
             c.V,
             in.values.view(),
             in.keys.view(),
             in.write_query.view(),
             in.write.view(),
             {},
             in.mask.view(),
             in.token_mask.view(),
             out.view(),
             {},
             in.scale,
             1};
  p.read_query = in.read_query.view(), p.reads = reads.view(), p.lse = lse.view(), p.lse_rest = rest.view(),
  p.read_first = in.read_first;
  verify(c, "memory_scan", {{"reads", &reads, &want_reads}, {"values", &out, &want}, {"lse", &lse, &in.lse}},
         [&] { MK_CALL(memory_scan, p); });

  const Tensor saved(c.dtype, want_reads), sums(c.stats(), in.lse), rests = rest_of(in.lse, sums);
  const int64_t missing = in.random.below(4);
  const Tensor d_reads = missing == 1 ? Tensor() : uniform(c.dtype, c.tokens(c.V), in.random, -1, 1);
  const Tensor d_out = missing == 2 ? Tensor() : uniform(c.content, c.slots(c.V), in.random, -1, 1);
  ScanGradients d;
  d.reads = d_reads.wide(), d.out = d_out.wide();
  d.values = gradient(in.random, in.values.layout());
  if (c.T > 0) d.keys = gradient(in.random, in.keys.layout()), d.mask = gradient(in.random, in.mask);
  d.read_query = gradient(in.random, c.tokens(c.K)), d.write_query = gradient(in.random, c.tokens(c.K));
  d.write = gradient(in.random, c.tokens(c.V));
  const Wide known = saved.wide();
  for (const auto& places : all) {
    for (int64_t i = 0; i < c.N; ++i) one_slot(c, in, places, i, want_reads, want, &known, &d);
  }
  Tensor dv(c.stats(), d.values), dk(c.stats(), d.keys), drq(c.stats(), d.read_query);
  Tensor dwq(c.stats(), d.write_query), dw(c.stats(), d.write), dm(c.stats(), d.mask);
  mk::MemoryScanBackward b{p,          d_reads.view(), d_out.view(), dv.view(), dk.view(),
                           drq.view(), dwq.view(),     dw.view(),    dm.view()};
  b.forward.reads = saved.view(), b.forward.lse = sums.view(), b.forward.lse_rest = rests.view(),
  b.forward.write.out = mk::View{};
  verify(c, "memory_scan_backward",
         {{"d_values", &dv, &d.values},
          {"d_keys", &dk, &d.keys},
          {"d_read_query", &drq, &d.read_query},
          {"d_write_query", &dwq, &d.write_query},
          {"d_write", &dw, &d.write},
          {"d_mask", &dm, &d.mask}},
         [&] { MK_CALL(memory_scan_backward, b); });
}

namespace {
FAMILY(gated_scan)
FAMILY(cell_scan)
FAMILY(memory_scan)
}  // namespace

}  // namespace native
