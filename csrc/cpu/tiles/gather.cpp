// Scattered rows of any dtype, converted at load. Their weighted sum stays in registers while rows are loaded.
#include "cpu/tiles/gather.h"

#include "cpu/tiles/load_as.h"

namespace mk::MK_ISA {
namespace {

// out[0..NV registers) (+)= sum_j weights[j] * row_j, from byte `offset` of each row. The last register has `live`
// lanes.
template <class F, DType D, int NV, bool whole>
inline void sum_block(const char* const* rows, const F* weights, int64_t n, int64_t offset, int64_t live, bool add,
                      F* out) {
  constexpr int bytes = kLanes<F> * kSize<D>;
  Vec<F> acc[NV];
#pragma GCC unroll 16
  for (int i = 0; i < NV; ++i) acc[i] = fill<F>(0);
  for (int64_t j = 0; j < n; ++j) {
    const char* p = rows[j] + offset;
    const char* ahead = rows[j + kAhead] + offset;
#pragma GCC unroll 16
    for (int i = 0; i < NV * bytes; i += 64) __builtin_prefetch(ahead + i, 0, 2);
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

template <class F, DType D, int NV>
inline int64_t sum_blocks(const char* const* rows, const F* weights, int64_t n, int64_t width, int64_t c, bool add,
                          F* out) {
  constexpr int64_t lanes = NV * kLanes<F>;
  for (; c + lanes <= width; c += lanes) sum_block<F, D, NV, true>(rows, weights, n, c * kSize<D>, 0, add, out + c);
  if constexpr (NV > 1) return sum_blocks<F, D, NV / 2>(rows, weights, n, width, c, add, out);
  return c;
}

template <class F, DType D>
inline void sum_of(const char* const* rows, const F* weights, int64_t n, int64_t width, F* out) {
  constexpr int kWidest = MK_BYTES == 64 ? 16 : 8;
  for (int64_t first = 0; first < n || first == 0; first += kTerms) {
    const char* const* some = rows + first;
    const F* w = weights + first;
    const int64_t count = least(kTerms, n - first);
    const bool add = first > 0;
    const int64_t c = sum_blocks<F, D, kWidest>(some, w, count, width, 0, add, out);
    if (c < width) sum_block<F, D, 1, false>(some, w, count, c * kSize<D>, width - c, add, out + c);
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
  with_dtype<float>(dtype, [&]<DType D>() { sum_of<float, D>(rows, weights, n, width, out); });
}
void row_products(DType dtype, const char* const* rows, int64_t n, int64_t width, const float* x, float* out) {
  with_dtype<float>(dtype, [&]<DType D>() { products_of<float, D>(rows, n, width, x, out); });
}
void weighted_sum(DType dtype, const char* const* rows, const double* weights, int64_t n, int64_t width, double* out) {
  with_dtype<double>(dtype, [&]<DType D>() { sum_of<double, D>(rows, weights, n, width, out); });
}
void row_products(DType dtype, const char* const* rows, int64_t n, int64_t width, const double* x, double* out) {
  with_dtype<double>(dtype, [&]<DType D>() { products_of<double, D>(rows, n, width, x, out); });
}

}  // namespace mk::MK_ISA
