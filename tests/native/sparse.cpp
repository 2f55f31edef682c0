// sparse_write: applies entries in order to their slots, forward and backward.
#include <algorithm>

#include "kernels.h"
#include "params/sparse_write.h"

namespace native {

void sparse_write(const Case& c) {
  if (c.N == 0) return;
  Random random(c.seed);
  const Layout slots = c.slots(c.V);
  const bool vector = random.one_in(2);
  const Tensor values = uniform(c.content, slots, random, -1, 1, c.gap);
  const Tensor weights = uniform(c.dtype, c.of(c.query, c.T, c.k), random, 0, 1, c.gap);
  const Tensor write = uniform(c.content, c.of(c.query, c.T, c.V), random, -1, 1, c.gap);
  const Tensor erase = vector ? uniform(c.content, c.tokens(c.V), random, 0, 1, c.gap) : Tensor();
  const double number = random.one_in(2) ? 1 : 0.375;
  Wide index(c.tokens(c.k));
  const int64_t few = random.one_in(2) ? 1 : c.N;  // every entry names one slot
  for (double& x : index.all()) x = double(random.below(few + 1) - 1);
  const Tensor indices(DType::i64, index, c.gap), d_out = uniform(c.content, slots, random, -1, 1);
  Tensor token_mask;
  if (random.one_in(2)) {
    Wide x(c.of(c.query, c.T, 1));
    for (double& on : x.all()) on = random.one_in(3) ? -kInfinity : 0;
    token_mask = Tensor(DType::boolean, x);
  }
  const Wide v = values.wide(), a = weights.wide(), w = write.wide(), e = erase.wide(), live = token_mask.wide();
  Wide want(slots), dv(slots), want_da = gradient(random, c.tokens(c.k));
  Wide want_dw = gradient(random, c.tokens(c.V)), want_de = vector ? gradient(random, c.tokens(c.V)) : Wide();
  want.all() = v.all();
  dv.all() = d_out.wide().all();

  struct Step {
    int64_t place, t, j, slot;
    std::vector<double> before;
  };
  std::vector<Step> steps;
  auto erased = [&](const Step& s, int64_t x) { return vector ? e.row(s.place, s.t)[x] : number; };
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t j = 0; j < c.k; ++j) {
        const auto slot = int64_t(index.row(place, t)[j]);
        if (slot < 0 || (live && live.row(place, t)[0] == -kInfinity)) continue;
        double* row = want.row(place, slot);
        steps.push_back({place, t, j, slot, std::vector<double>(row, row + c.V)});
        const double share = a.row(place, t)[j];
        for (int64_t x = 0; x < c.V; ++x) row[x] += share * (w.row(place, t)[x] - erased(steps.back(), x) * row[x]);
      }
    }
  }
  for (size_t n = steps.size(); n-- > 0;) {
    const Step& s = steps[n];
    const double share = a.row(s.place, s.t)[s.j];
    double *g = dv.row(s.place, s.slot), da = 0;
    for (int64_t x = 0; x < c.V; ++x) {
      const double old = s.before[size_t(x)], out = erased(s, x);
      da += g[x] * (w.row(s.place, s.t)[x] - out * old);
      if (want_dw) want_dw.row(s.place, s.t)[x] += share * g[x];
      if (want_de) want_de.row(s.place, s.t)[x] -= share * g[x] * old;
      g[x] *= 1 - share * out;
    }
    if (want_da) want_da.row(s.place, s.t)[s.j] = da;
  }

  Tensor out(c.content, slots);
  const mk::SparseWrite p{{c.lead, c.T, c.k, c.N, indices.view()},
                          c.V,
                          values.view(),
                          weights.view(),
                          write.view(),
                          erase.view(),
                          token_mask.view(),
                          out.view(),
                          number};
  verify(c, "sparse_write", {{"values", &out, &want}}, [&] { MK_CALL(sparse_write, p); });
  Tensor own(c.content, v, c.gap);
  mk::SparseWrite here = p;
  here.values = here.out = own.view();
  verify(c, "sparse_write in place", {{"values", &own, &want}}, [&] {
    own.assign(v);
    MK_CALL(sparse_write, here);
  });

  const Wide want_dv = random.one_in(4) ? Wide() : dv;
  Tensor d_values(c.content, want_dv), d_weights(c.dtype, want_da), dw(c.stats(), want_dw), de(c.stats(), want_de);
  const mk::SparseWriteBackward b{p, d_out.view(), d_values.view(), d_weights.view(), dw.view(), de.view()};
  verify(c, "sparse_write_backward",
         {{"d_values", &d_values, &want_dv},
          {"d_weights", &d_weights, &want_da},
          {"d_write", &dw, &want_dw},
          {"d_erase", &de, &want_de}},
         [&] { MK_CALL(sparse_write_backward, b); });
}

namespace {
FAMILY(sparse_write)
}  // namespace

}  // namespace native
