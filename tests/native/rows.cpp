// sparse_read and merge_reads: weighted sums of given rows.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "params/merge_reads.h"
#include "params/sparse_read.h"

namespace native {

void sparse_read(const Case& c) {
  Random random(c.seed);
  const SlotRows values(c, c.packed_values, c.keys, c.V, random);
  const Tensor weights = uniform(c.dtype, c.of(c.query, c.T, c.k), random, -1, 1, c.gap);
  Wide i(c.tokens(c.k));
  for (double& x : i.all()) x = double(random.below(c.N + 1) - 1);
  const Tensor indices(DType::i64, i, c.gap), d_read = uniform(c.dtype, c.tokens(c.V), random, -1, 1);
  const Wide v = values.wide(), w = weights.wide(), dr = d_read.wide();
  Wide want(c.tokens(c.V)), want_dw = gradient(random, c.tokens(c.k)), want_dv = values.gradient(random);
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t j = 0; j < c.k; ++j) {
        const auto at = int64_t(i.row(place, t)[j]);
        if (at < 0) continue;
        add(w.row(place, t)[j], v.row(place, at), c.V, want.row(place, t));
        if (want_dw) want_dw.row(place, t)[j] = dot(v.row(place, at), dr.row(place, t), c.V);
        if (want_dv) add(w.row(place, t)[j], dr.row(place, t), c.V, want_dv.row(place, at));
      }
    }
  }
  Tensor read(c.dtype, c.tokens(c.V));
  const mk::SparseRead p{{c.lead, c.T, c.k, c.N, indices.view()}, c.V, values.view(), weights.view(), read.view()};
  verify(c, "wrong_index", {}, [&] {
    if (MK_CALL(wrong_index, p.choice) != -1) ++tally.failures;
  });
  verify(c, "sparse_read", {{"read", &read, &want}}, [&] { MK_CALL(sparse_read, p); });

  Tensor dw(c.query == c.all ? c.dtype : c.stats(), want_dw), dv(c.content, want_dv);
  mk::SparseReadBackward b{p, d_read.view(), {dv.view(), dv.all_rows()}, dw.view()};
  b.forward.read = mk::View{};
  verify(c, "sparse_read_backward", {{"d_weights", &dw, &want_dw}, {"d_values", &dv, &want_dv}},
         [&] { MK_CALL(sparse_read_backward, b); });
}

// Parts are slots of the case here, a few of them: rows s * T + t. No argument is memory, so every leading dimension is
// shared.
void merge_reads(const Case& grid) {
  Case c = grid;
  Random random(c.seed);
  std::fill_n(c.lead.shared, c.lead.rank, true);
  const int64_t S = c.N % 7;
  Wide l(c.of(c.all, S * c.T, 1));
  for (double& x : l.all()) x = random.one_in(4) ? -kInfinity : random.uniform(-3, 3);
  const Tensor lses(c.stats(), l);
  l = lses.wide();
  Tensor reads = uniform(c.dtype, c.of(c.all, S * c.T, c.V), random, -1, 1, c.gap);
  poison_empty(l, reads);
  const Wide r = reads.wide();
  const Tensor d_read = random.one_in(4) ? Tensor() : uniform(c.dtype, c.tokens(c.V), random, -1, 1);
  const Tensor d_lse = random.one_in(4) ? Tensor() : uniform(c.stats(), c.tokens(1), random, -1, 1);
  const Wide dr = d_read.wide(), dl = d_lse.wide();
  Wide want(c.tokens(c.V)), want_lse(c.tokens(1), -kInfinity);
  Wide want_dr = gradient(random, reads.layout()), want_dl = gradient(random, lses.layout());
  std::vector<double> w(static_cast<size_t>(S)), x(w);
  for (int64_t place = 0; place < c.places(); ++place) {
    for (int64_t t = 0; t < c.T; ++t) {
      double total = 0, mean = 0;
      for (int64_t s = 0; s < S; ++s) total += std::exp(*l.row(place, s * c.T + t));
      if (total == 0) continue;
      *want_lse.row(place, t) = std::log(total);
      for (int64_t s = 0; s < S; ++s) {
        const int64_t row = s * c.T + t;
        w[size_t(s)] = std::exp(*l.row(place, row)) / total;
        if (w[size_t(s)] == 0) continue;
        add(w[size_t(s)], r.row(place, row), c.V, want.row(place, t));
        x[size_t(s)] = dr ? dot(dr.row(place, t), r.row(place, row), c.V) : 0;
        mean += w[size_t(s)] * x[size_t(s)];
        if (want_dr && dr) add(w[size_t(s)], dr.row(place, t), c.V, want_dr.row(place, row));
      }
      for (int64_t s = 0; want_dl && s < S; ++s) {
        if (w[size_t(s)] == 0) continue;
        *want_dl.row(place, s * c.T + t) = w[size_t(s)] * (x[size_t(s)] - mean + (dl ? *dl.row(place, t) : 0));
      }
    }
  }
  Tensor read(c.dtype, c.tokens(c.V)), lse(c.stats(), c.tokens(1));
  auto part = [&](const Tensor& t) { return c.T * t.row_bytes(); };
  const mk::MergeReads p{c.lead,      S,           c.T,        c.V,         reads.view(),
                         lses.view(), part(reads), part(lses), read.view(), lse.view()};
  verify(c, "merge_reads", {{"read", &read, &want}, {"lse", &lse, &want_lse}}, [&] { MK_CALL(merge_reads, p); });

  Tensor d_reads(c.dtype, want_dr), d_lses(c.stats(), want_dl);
  const mk::MergeReadsBackward b{p,
                                 d_read.view(),
                                 d_lse.view(),
                                 d_reads.view(),
                                 d_lses.view(),
                                 d_reads ? part(d_reads) : 0,
                                 d_lses ? part(d_lses) : 0};
  verify(c, "merge_reads_backward", {{"d_reads", &d_reads, &want_dr}, {"d_lses", &d_lses, &want_dl}},
         [&] { MK_CALL(merge_reads_backward, b); });
}

namespace {
FAMILY(merge_reads)
FAMILY(sparse_read)
}  // namespace

}  // namespace native
