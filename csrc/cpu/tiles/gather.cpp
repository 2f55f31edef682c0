// Scattered rows of any dtype, converted at load. Their weighted sum stays in registers while rows are loaded.
#include "cpu/tiles/gather.h"

#include "cpu/tiles/load_as.h"

namespace mk::MK_ISA {
namespace {

// Where the rows of a sum lie: pointers, prefetched ahead;
struct Listed {
  const char* const* rows;
  MK_INLINE const char* at(int64_t j) const { return rows[j]; }
  template <int kBytes>
  MK_INLINE void prefetch(int64_t j, int64_t offset) const {
#pragma GCC unroll 16
    for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(rows[j + kAhead] + offset + i, 0, 2);
  }
  Listed from(int64_t j) const { return {rows + j}; }
};
// or numbers of rows that a cache holds, null for -1.
struct Named {
  const char* base;
  int64_t stride;
  const int64_t* index;
  MK_INLINE const char* at(int64_t j) const { return index[j] < 0 ? nullptr : base + index[j] * stride; }
  template <int kBytes>
  MK_INLINE void prefetch(int64_t, int64_t) const {}
  Named from(int64_t j) const { return {base, stride, index + j}; }
};

// out[0..NV registers) (+)= sum_j weights[j] * row_j, from byte `offset` of each row. The last register has `live`
// lanes.
template <class F, DType D, int NV, bool whole, class Rows>
MK_INLINE void sum_block(Rows rows, const F* weights, int64_t n, int64_t offset, int64_t live, bool add, F* out) {
  constexpr int bytes = kLanes<F> * kSize<D>;
  Vec<F> acc[NV];
#pragma GCC unroll 16
  for (int i = 0; i < NV; ++i) acc[i] = fill<F>(0);
  for (int64_t j = 0; j < n; ++j) {
    const char* p = rows.at(j);
    if (std::is_same_v<Rows, Named> && p == nullptr) continue;
    p += offset;
    rows.template prefetch<NV * bytes>(j, offset);
    const Vec<F> w = fill<F>(weights[j]);
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) {
      if (whole || i + 1 < NV) acc[i] += w * load_as<F, D>(p + i * bytes);
      else acc[i] += w * load_first_as<F, D>(p + i * bytes, live);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < NV; ++i) {
    if (add) acc[i] += load<F>(out + i * kLanes<F>);
    store<F>(out + i * kLanes<F>, acc[i]);
  }
}

template <class F, DType D, int NV, class Rows>
MK_INLINE int64_t sum_blocks(Rows rows, const F* weights, int64_t n, int64_t width, int64_t c, bool add, F* out) {
  constexpr int64_t lanes = NV * kLanes<F>;
  for (; c + lanes <= width; c += lanes) {
    sum_block<F, D, NV, true>(rows, weights, n, c * kSize<D>, 0, add, out + c);
  }
  if constexpr (NV > 1) return sum_blocks<F, D, NV / 2>(rows, weights, n, width, c, add, out);
  return c;
}

template <class F, DType D, class Rows>
MK_INLINE void sum_of(Rows rows, const F* weights, int64_t n, int64_t width, F* out) {
  constexpr int kWidest = MK_BYTES == 64 ? 16 : 8;
  for (int64_t first = 0; first < n || first == 0; first += kTerms) {
    const Rows some = rows.from(first);
    const F* w = weights + first;
    const int64_t count = least(kTerms, n - first);
    const bool add = first > 0;
    const int64_t c = sum_blocks<F, D, kWidest>(some, w, count, width, 0, add, out);
    if (c < width) sum_block<F, D, 1, false>(some, w, count, c * kSize<D>, width - c, add, out + c);
  }
}

template <class F, DType D>
inline void sums_of(const NamedRows& r, const F* weights, int64_t width, F* out) {
  for (int64_t t = 0; t < r.tokens; ++t) {
    const Named rows{r.base, r.stride, r.index + t * r.k};
    sum_of<F, D>(rows, weights + t * r.k, r.k, width, out + t * width);
  }
}

// Row after row: adjacent rows are then read in address order, which hardware prefetch follows best.
template <class F, DType D>
inline void products_of(const char* const* rows, int64_t n, int64_t width, const F* x, F* out) {
  constexpr int W = kLanes<F>;
  const int64_t whole = width / W * W;
  for (int64_t j = 0; j < n; j += W) {
    Vec<F> acc[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      const char* p = rows[least(j + i, n - 1)];
      const char* ahead = rows[least(j + i, n - 1) + kAhead];
      for (int64_t at = 0; at < width * kSize<D>; at += 64) __builtin_prefetch(ahead + at, 0, 2);
      acc[i] = fill<F>(0);
#pragma GCC unroll 1
      for (int64_t c = 0; c < whole; c += W) acc[i] += load_as<F, D>(p + c * kSize<D>) * load<F>(x + c);
      if (whole < width) acc[i] += load_first_as<F, D>(p + whole * kSize<D>, width - whole) * load<F>(x + whole);
    }
    const Vec<F> s = sums<F>(acc);
    if (j + W <= n) {
      store<F>(out + j, s);
    } else {
      F lanes[W];
      store<F>(lanes, s);
      for (int64_t i = 0; j + i < n; ++i) out[j + i] = lanes[i];
    }
  }
}

}  // namespace

void weighted_sum(DType dtype, const char* const* rows, const float* weights, int64_t n, int64_t width, float* out) {
  with_dtype<float>(dtype, [&]<DType D>() { sum_of<float, D>(Listed{rows}, weights, n, width, out); });
}
void row_products(DType dtype, const char* const* rows, int64_t n, int64_t width, const float* x, float* out) {
  with_dtype<float>(dtype, [&]<DType D>() { products_of<float, D>(rows, n, width, x, out); });
}
void weighted_sum(DType dtype, const char* const* rows, const double* weights, int64_t n, int64_t width, double* out) {
  with_dtype<double>(dtype, [&]<DType D>() { sum_of<double, D>(Listed{rows}, weights, n, width, out); });
}
void row_products(DType dtype, const char* const* rows, int64_t n, int64_t width, const double* x, double* out) {
  with_dtype<double>(dtype, [&]<DType D>() { products_of<double, D>(rows, n, width, x, out); });
}

void weighted_sums(const NamedRows& r, const float* weights, int64_t width, float* out) {
  with_dtype<float>(r.dtype, [&]<DType D>() { sums_of<float, D>(r, weights, width, out); });
}
void weighted_sums(const NamedRows& r, const double* weights, int64_t width, double* out) {
  with_dtype<double>(r.dtype, [&]<DType D>() { sums_of<double, D>(r, weights, width, out); });
}

}  // namespace mk::MK_ISA
