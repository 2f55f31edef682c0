// ngram_slots, gather_rows and memory_gate: the ops of a lookup memory. No argument of theirs is a memory with leading
// dimensions, so all of those are folded into the tokens.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "params/gather_rows.h"
#include "params/memory_gate.h"
#include "params/ngram_slots.h"

namespace native {
namespace {

Case folded(const Case& grid) {
  Case c = grid;
  std::fill_n(c.lead.shared, c.lead.rank, true);
  return c;
}

int64_t modulus(int64_t x, int64_t d) { return (x % d + d) % d; }

}  // namespace

void ngram_slots(const Case& grid) {
  const Case c = folded(grid);
  Random random(c.seed);
  const int64_t n_max = 1 + random.below(5), heads = 1 + random.below(3), vocabulary = 40;
  std::vector<int64_t> orders(size_t(1 + random.below(3)));
  for (int64_t& order : orders) order = 1 + random.below(n_max);
  const int64_t M = int64_t(orders.size()) * heads, pad = random.below(100) - 50;
  std::vector<int64_t> sizes(static_cast<size_t>(M)), factors(static_cast<size_t>(n_max)), map(vocabulary), ignore(3);
  for (int64_t& size : sizes) size = random.one_in(9) ? 1 : 1 + random.below(random.one_in(2) ? 1000 : 1 << 30);
  for (int64_t& factor : factors) factor = int64_t(random.next() | 1);
  for (int64_t& x : map) x = random.below(int64_t(1) << 40);
  for (int64_t& x : ignore) x = random.below(vocabulary);
  const bool mapped = random.one_in(2), ignores = random.one_in(2);
  Wide t(c.of(c.query, 1, c.T)), h(c.of(c.keys, 1, n_max - 1)), f(c.of(c.all, 1, c.T));
  for (double& x : t.all()) x = double(random.below(vocabulary + 1) - 1);
  for (double& x : h.all()) x = double(random.below(vocabulary + 1) - 1);
  for (double& x : f.all()) x = double(random.below(c.T + 4) - 4);
  const bool has_history = n_max > 1 && random.one_in(2), has_first = c.T > 0 && random.one_in(2);
  const Tensor tokens(DType::i64, t), history = has_history ? Tensor(DType::i64, h) : Tensor();
  const Tensor first = has_first ? Tensor(DType::i64, f) : Tensor();
  Wide want(c.tokens(M));
  for (int64_t place = 0; place < c.places(); ++place) {
    const auto gone = [&](double token) {
      return token < 0 || (ignores && std::count(ignore.begin(), ignore.end(), int64_t(token)) > 0);
    };
    const auto at = [&](int64_t i) {
      return i >= 0 ? t.row(place, 0)[i] : has_history && i > -n_max ? h.row(place, 0)[i + n_max - 1] : -1.0;
    };
    for (int64_t i = 0; i < c.T; ++i) {
      const double begin = has_first ? f.row(place, 0)[i] : double(-n_max);
      double offset = 0;
      for (int64_t m = 0; m < M; offset += double(sizes[size_t(m++)])) {
        uint64_t mix = 0;
        for (int64_t j = 0; j < orders[size_t(m / heads)]; ++j) {
          const double token = double(i - j) < begin ? -1 : at(i - j);
          const int64_t x = gone(token) ? pad : mapped ? map[size_t(token)] : int64_t(token);
          mix ^= uint64_t(x) * uint64_t(factors[size_t(j)]);
        }
        want.row(place, i)[m] = gone(at(i)) ? -1 : offset + double(modulus(int64_t(mix), sizes[size_t(m)]));
      }
    }
  }
  Tensor slots(DType::i64, c.tokens(M));
  mk::NgramSlots p{};
  p.lead = c.lead, p.T = c.T, p.M = M, p.heads = heads, p.pad = pad, p.n_max = n_max, p.vocabulary = vocabulary;
  p.tokens = tokens.view(), p.history = history.view(), p.first = first.view();
  p.sizes = sizes.data(), p.multipliers = factors.data(), p.orders = orders.data();
  p.token_map = mapped ? map.data() : nullptr;
  p.ignore = ignore.data(), p.ignored = ignores ? int64_t(ignore.size()) : 0;
  p.slots = reinterpret_cast<int64_t*>(slots.view().data);
  verify(c, "ngram_slots", {{"slots", &slots, &want}}, [&] {
    if (MK_CALL(ngram_slots, p) != -1) ++tally.failures;
  });
}

void gather_rows(const Case& grid) {
  const Case c = folded(grid);
  Random random(c.seed);
  const bool packed = mk::is_compressed(c.packed_values);
  const DType kind = packed ? c.packed_values : c.dtype == DType::f64 || random.one_in(2) ? c.dtype : DType::f32;
  const Tensor values = SlotRows(c, kind, 0, c.V, random).rows;
  const int64_t block = random.one_in(2) ? std::max<int64_t>(c.V, 1) : 1 + random.below(40);
  Tensor scale;
  if (packed) scale = uniform(DType::f32, c.of(0, c.N, mk::div_up(c.V, block)), random, 0.5, 1);
  const int64_t count = c.places() * c.k;
  std::vector<int64_t> indices(static_cast<size_t>(count));
  for (int64_t& i : indices) i = random.below(c.N + 1) - 1;
  const Wide v = values.wide(), s = scale.wide();
  const Layout rows(c.lead, c.all, c.k, c.V);
  const Tensor d_rows = uniform(c.dtype, rows, random, -1, 1);
  const Wide d = d_rows.wide();
  Wide want(rows), want_dv = packed ? Wide() : gradient(random, values.layout());
  for (int64_t j = 0; j < count; ++j) {
    const int64_t i = indices[size_t(j)], place = j / c.k, row = j % c.k;
    if (i < 0) continue;
    double* out = want.row(place, row);
    for (int64_t col = 0; col < c.V; ++col) out[col] = v.row(0, i)[col] * (packed ? s.row(0, i)[col / block] : 1);
    if (want_dv) add(1, d.row(place, row), c.V, want_dv.row(0, i));
  }
  Tensor out(c.dtype, rows);
  const mk::View table = values.view(), factors = scale.view();
  const mk::GatherRows p{count,        c.N,        c.V,         indices.data(), table.data,      kind,   table.row,
                         factors.data, DType::f32, factors.row, block,          out.view().data, c.dtype};
  verify(c, "gather_rows", {{"rows", &out, &want}}, [&] {
    if (MK_CALL(gather_rows, p) != -1) ++tally.failures;
  });
  if (packed) return;

  // The indices as a tensor [places, k], every one of them a token of its own.
  Wide named(c.of(c.all, c.k, 1));
  for (int64_t j = 0; j < count; ++j) *named.row(j / c.k, j % c.k) = double(indices[size_t(j)]);
  const Tensor tokens(DType::i64, named);
  Tensor dv(kind, want_dv);
  const mk::GatherRowsBackward b{{c.lead, c.k, 1, c.N, tokens.view()}, c.V, d_rows.view(), whole(dv)};
  verify(c, "gather_rows_backward", {{"d_values", &dv, &want_dv}}, [&] { MK_CALL(gather_rows_backward, b); });
}

void memory_gate(const Case& grid) {
  const Case c = folded(grid);
  Random random(c.seed);
  const int64_t B = 1 + c.T % 4, D = c.V;
  const DType weights = is_half(c.dtype) && random.one_in(2) ? DType::f32 : c.dtype;
  const Tensor hidden = uniform(c.dtype, c.of(c.query, B, D), random, -1, 1, c.gap);
  Wide agreeing(c.of(c.all, B, D));  // a key near the hidden state or its opposite: a root near 0 has no digits
  const Wide h = hidden.wide();
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t b = 0; b < B; ++b) {
      const double sign = random.one_in(2) ? 1 : -1;
      for (int64_t i = 0; i < D; ++i) agreeing.row(place, b)[i] = sign * h.row(place, b)[i] + random.uniform(-0.2, 0.2);
    }
  }
  const Tensor key(c.dtype, agreeing), value = uniform(c.dtype, c.of(c.keys, 1, D), random, -1, 1);
  const Tensor w_h = uniform(weights, c.of(0, B, D), random, 0.5, 1.5),
               w_k = uniform(weights, c.of(0, B, D), random, 0.5, 1.5);
  const Tensor d_gated = uniform(c.dtype, c.of(c.all, B, D), random, -1, 1);
  const Wide k = key.wide(), v = value.wide(), wh = w_h.wide(), wk = w_k.wide(), d = d_gated.wide();
  const bool root = random.one_in(2);
  constexpr double eps = 1e-3;
  Wide want(c.of(c.all, B, D)), want_rh(c.of(c.all, 1, B)), want_rk(want_rh), want_g(want_rh);
  Wide want_dh = gradient(random, want.layout()), want_dk = gradient(random, want.layout());
  Wide want_dv = gradient(random, c.of(c.all, 1, D)), want_dwh = gradient(random, w_h.layout());
  Wide want_dwk = gradient(random, w_k.layout());
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t b = 0; b < B; ++b) {
      const double *x = h.row(place, b), *y = k.row(place, b), *z = v.row(place, 0), *dz = d.row(place, b);
      const double *u = wh.row(0, b), *w = wk.row(0, b), n = double(std::max<int64_t>(D, 1));
      const double rh = 1 / std::sqrt(dot(x, x, D) / n + eps), rk = 1 / std::sqrt(dot(y, y, D) / n + eps);
      double g = 0;
      for (int64_t i = 0; i < D; ++i) g += x[i] * u[i] * y[i] * w[i] * rh * rk / std::sqrt(n);
      const double size = std::sqrt(std::max(std::fabs(g), 1e-6)), s = !root ? g : g == 0 ? 0 : std::copysign(size, g);
      const double a = 1 / (1 + std::exp(-s)), slope = !root ? 1 : std::fabs(g) >= 1e-6 ? 0.5 / size : 0;
      const double dg = dot(dz, z, D) * a * (1 - a) * slope, factor = dg * rh * rk / std::sqrt(n);
      want_rh.row(place, 0)[b] = rh, want_rk.row(place, 0)[b] = rk, want_g.row(place, 0)[b] = g;
      for (int64_t i = 0; i < D; ++i) {
        want.row(place, b)[i] = a * z[i];
        if (want_dh) want_dh.row(place, b)[i] = factor * y[i] * u[i] * w[i] - dg * g * rh * rh * x[i] / n;
        if (want_dk) want_dk.row(place, b)[i] = factor * x[i] * u[i] * w[i] - dg * g * rk * rk * y[i] / n;
        if (want_dv) want_dv.row(place, 0)[i] += a * dz[i];
        if (want_dwh) want_dwh.row(0, b)[i] += factor * x[i] * y[i] * w[i];
        if (want_dwk) want_dwk.row(0, b)[i] += factor * x[i] * y[i] * u[i];
      }
    }
  }
  Tensor gated(c.dtype, want.layout()), rh(c.stats(), want_rh), rk(c.stats(), want_rk), g(c.stats(), want_g);
  mk::MemoryGate p{c.lead,     B,   D,    hidden.view(), key.view(), value.view(), w_h.view(),
                   w_k.view(), eps, root, gated.view(),  rh.view(),  rk.view(),    g.view()};
  verify(
      c, "memory_gate",
      {{"gated", &gated, &want}, {"hidden_rstd", &rh, &want_rh}, {"key_rstd", &rk, &want_rk}, {"score", &g, &want_g}},
      [&] { MK_CALL(memory_gate, p); });
  rh.assign(want_rh), rk.assign(want_rk), g.assign(want_g);

  Tensor dh(c.dtype, want_dh), dk(c.dtype, want_dk), dv(c.dtype, want_dv);
  Tensor dwh(c.stats(), want_dwh), dwk(c.stats(), want_dwk);
  mk::MemoryGateBackward b{p, d_gated.view(), dh.view(), dk.view(), dv.view(), dwh.view(), dwk.view()};
  b.forward.gated = mk::View{};
  verify(c, "memory_gate_backward",
         {{"d_hidden", &dh, &want_dh},
          {"d_key", &dk, &want_dk},
          {"d_value", &dv, &want_dv},
          {"d_hidden_weight", &dwh, &want_dwh},
          {"d_key_weight", &dwk, &want_dwk}},
         [&] { MK_CALL(memory_gate_backward, b); });
}

namespace {
FAMILY(ngram_slots)
FAMILY(gather_rows)
FAMILY(memory_gate)
}  // namespace

}  // namespace native
