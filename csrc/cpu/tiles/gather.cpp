// Scattered rows of any dtype, converted as they are loaded: their weighted sum stays in registers while the rows come in.
#include "cpu/tiles/gather.h"

namespace mk::MK_ISA {
namespace {

template <DType D>
constexpr int kSize = D == DType::f32                      ? 4
                      : D == DType::f64                    ? 8
                      : D == DType::i8 || D == DType::e4m3 ? 1
                                                           : 2;

// One register of numbers of dtype D.
template <class F, DType D>
MK_INLINE Vec<F> load_as(const char* p) {
  if constexpr (D == DType::f32 || D == DType::f64) {
    return load<F>(reinterpret_cast<const F*>(p));
  } else if constexpr (D == DType::i8 || D == DType::e4m3) {
    if constexpr (sizeof(F) == 4) {
      return load_compressed<D>(p);
    } else {
      F lanes[kLanes<F>];
      read_compressed<F, D>(p, kLanes<F>, F(1), lanes);
      return load<F>(lanes);
    }
  } else {
    [[maybe_unused]] const auto* h = reinterpret_cast<const uint16_t*>(p);
#if defined(__AVX512F__)
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (D == DType::f16) return (Vec<F>)_mm512_cvtph_ps(x);
    else return (Vec<F>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
#elif defined(__AVX2__)
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (D == DType::f16) return (Vec<F>)_mm256_cvtph_ps(x);
    else return (Vec<F>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16);
#else
    F lanes[kLanes<F>];
    for (int i = 0; i < kLanes<F>; ++i) {
      lanes[i] = D == DType::f16 ? half_to_float(h[i]) : from_bits(uint32_t(h[i]) << 16);
    }
    return load<F>(lanes);
#endif
  }
}

// Its first n lanes, the others zero; never reads past them.
template <class F, DType D>
MK_INLINE Vec<F> load_first_as(const char* p, int64_t n) {
  if constexpr (D == DType::f32 || D == DType::f64) {
    return load_first<F>(reinterpret_cast<const F*>(p), n);
  } else {
    using Bits = std::conditional_t<kSize<D> == 1, uint8_t, uint16_t>;
    alignas(64) Bits lanes[kLanes<F>] = {};
    const auto* h = reinterpret_cast<const Bits*>(p);
    for (int64_t i = 0; i < n; ++i) lanes[i] = h[i];
    return load_as<F, D>(reinterpret_cast<const char*>(lanes));
  }
}

// Calls body.template operator()<D>() with the dtype as a constant.
template <class F, class Body>
MK_INLINE void with_dtype(DType dtype, Body&& body) {
  if (dtype == DType::i8) {
    body.template operator()<DType::i8>();
  } else if (dtype == DType::e4m3) {
    body.template operator()<DType::e4m3>();
  } else if constexpr (sizeof(F) == 8) {
    body.template operator()<DType::f64>();
  } else {
    if (dtype == DType::f32) body.template operator()<DType::f32>();
    else if (dtype == DType::bf16) body.template operator()<DType::bf16>();
    else body.template operator()<DType::f16>();
  }
}

// out[0..NV registers) = sum_j weights[j] * row_j at byte `offset`, or is increased by it; the last register holds `live` lanes.
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

// Row after row: where rows follow one another the hardware reads ahead, in that order best.
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
