// One vector register, for whatever instruction set this file is compiled for. Kernels are written on these and compiled per
// set; GCC and Clang vector extensions carry the arithmetic, so a new architecture needs only its register width.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define MK_BYTES 64
#elif defined(__AVX2__)
#define MK_BYTES 32
#else
#define MK_BYTES 16
#endif

#define MK_INLINE inline __attribute__((always_inline))

namespace mk::MK_ISA {

template <class F>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(MK_BYTES)));
  typedef int32_t ints __attribute__((vector_size(MK_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(MK_BYTES)));
  typedef int64_t ints __attribute__((vector_size(MK_BYTES)));
};
template <class F>
using Vec = typename VecOf<F>::type;
template <class F>
using Ints = typename VecOf<F>::ints;
template <class F>
constexpr int kLanes = MK_BYTES / int(sizeof(F));
template <class F>
constexpr F kInf = std::numeric_limits<F>::infinity();

template <class F>
MK_INLINE Vec<F> load(const F* p) {
  Vec<F> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class F>
MK_INLINE void store(F* p, Vec<F> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class F, size_t... I>
MK_INLINE Vec<F> fill_lanes(F x, std::index_sequence<I...>) {
  return Vec<F>{((void)I, x)...};
}
template <class F>
MK_INLINE Vec<F> fill(F x) {
  return fill_lanes<F>(x, std::make_index_sequence<size_t(kLanes<F>)>());
}

// First n lanes, the others zero; never reads past p + n.
template <class F>
MK_INLINE Vec<F> load_first(const F* p, int64_t n) {
  F lanes[kLanes<F>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load<F>(lanes);
}
#if defined(__AVX512F__)
template <>
MK_INLINE Vec<float> load_first<float>(const float* p, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
template <>
MK_INLINE Vec<double> load_first<double>(const double* p, int64_t n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
#endif

// a where a > b, else b: a NaN in `a` yields b.
template <class F>
MK_INLINE Vec<F> max(Vec<F> a, Vec<F> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) return (Vec<F>)_mm512_max_ps((__m512)a, (__m512)b);
  else return (Vec<F>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(F) == 4) return (Vec<F>)_mm256_max_ps((__m256)a, (__m256)b);
  else return (Vec<F>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

// Does any lane of a comparison hold?
template <class F>
MK_INLINE bool any(Ints<F> m) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) return _mm512_movepi32_mask((__m512i)m) != 0;
  else return _mm512_movepi64_mask((__m512i)m) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)m) != 0;
#else
  int64_t bits = 0;
  for (int i = 0; i < kLanes<F>; ++i) bits |= int64_t(m[i]);
  return bits != 0;
#endif
}

// One bit per lane of a comparison.
template <class F>
MK_INLINE uint32_t bits(Ints<F> m) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) return _mm512_movepi32_mask((__m512i)m);
  else return _mm512_movepi64_mask((__m512i)m);
#elif defined(__AVX2__)
  if constexpr (sizeof(F) == 4) return uint32_t(_mm256_movemask_ps((__m256)m));
  else return uint32_t(_mm256_movemask_pd((__m256d)m));
#else
  uint32_t b = 0;
  for (int i = 0; i < kLanes<F>; ++i) b |= uint32_t(m[i] != 0) << i;
  return b;
#endif
}

template <class F>
MK_INLINE F sum(Vec<F> v) {
  F lanes[kLanes<F>];
  store<F>(lanes, v);
  for (int w = kLanes<F> / 2; w > 0; w /= 2) {
    for (int i = 0; i < w; ++i) lanes[i] += lanes[i + w];
  }
  return lanes[0];
}
template <class F>
MK_INLINE F largest(Vec<F> v) {
  F lanes[kLanes<F>];
  store<F>(lanes, v);
  F m = lanes[0];
  for (int i = 1; i < kLanes<F>; ++i) m = lanes[i] > m ? lanes[i] : m;
  return m;
}

// --- W registers at once ----------------------------------------------------------------------------------------------------
// Lanes whose bit D is clear are a's in `first`, and a's partners D lanes further on in `second`; the others are b's.
template <class F, int D, size_t... I>
MK_INLINE void trade(Vec<F>& a, Vec<F>& b, std::index_sequence<I...>) {
  constexpr int W = kLanes<F>;
  const Vec<F> first = __builtin_shufflevector(a, b, (int(I) & D ? W + int(I) - D : int(I))...);
  const Vec<F> second = __builtin_shufflevector(a, b, (int(I) & D ? W + int(I) : int(I) + D)...);
  a = first, b = second;
}
template <class F, int D>
MK_INLINE void add_level(Vec<F>* x) {
  constexpr int W = kLanes<F>;
  if constexpr (D < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 2 * D) {
      trade<F, D>(x[i], x[i + D], std::make_index_sequence<size_t(W)>());
      x[i] += x[i + D];
    }
    add_level<F, 2 * D>(x);
  }
}
template <class F, int D = 1>
MK_INLINE void transpose(Vec<F>* x) {
  constexpr int W = kLanes<F>;
  if constexpr (D < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if ((i & D) == 0) trade<F, D>(x[i], x[i + D], std::make_index_sequence<size_t(W)>());
    }
    transpose<F, 2 * D>(x);
  }
}
// Lane r of the result is the sum of the lanes of x[r].
template <class F>
MK_INLINE Vec<F> sums(Vec<F>* x) {
  add_level<F, 1>(x);
  return x[0];
}

// --- exponentials -------------------------------------------------------------------------------------------------------
// 2^f on [-0.5, 0.5], interpolated at Chebyshev nodes, exact at 0: relative error 3e-7 (float), 5e-18 + rounding (double).
template <class F>
MK_INLINE Vec<F> exp2_fraction(Vec<F> f) {
  if constexpr (sizeof(F) == 4) {
    Vec<F> p = fill<F>(0.00133813021f);
    p = p * f + 0.00966636837f;
    p = p * f + 0.0555038117f;
    p = p * f + 0.240223497f;
    p = p * f + 0.693147182f;
    return p * f + 1.0f;
  } else {
    Vec<F> p = fill<F>(4.455591365216115e-10);
    p = p * f + 7.074190907320507e-09;
    p = p * f + 1.017805882243255e-07;
    p = p * f + 1.3215432559319352e-06;
    p = p * f + 1.5252733836683869e-05;
    p = p * f + 0.00015403530463664123;
    p = p * f + 0.0013333558146412547;
    p = p * f + 0.009618129107587328;
    p = p * f + 0.0555041086648216;
    p = p * f + 0.24022650695910158;
    p = p * f + 0.6931471805599453;
    return p * f + 1.0;
  }
}

constexpr double kLog2e = 1.4426950408889634;

// e^t = 2^n 2^f with n + f = t log2(e): 0 below the smallest normal number, inf above the largest, NaN for NaN. `kLargest`: no t
// counts as more than that.
template <class F, int kLargest = 1000>
MK_INLINE Vec<F> exp(Vec<F> t) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) {
    // Operand order keeps NaN; the bounds keep -inf - -inf from becoming one.
    constexpr float bound = kLargest < 140 ? float(kLargest) : 140;
    const __m512 unit = _mm512_set1_ps(float(kLog2e));
    const __m512 x = _mm512_min_ps(_mm512_set1_ps(bound), _mm512_max_ps(_mm512_set1_ps(-140), (__m512)t));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, unit), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_fmsub_ps(x, unit, n);
    return (Vec<F>)_mm512_scalef_ps((__m512)exp2_fraction<F>((Vec<F>)f), n);
  }
#endif
  constexpr F largest = sizeof(F) == 4 ? F(88.72283) : F(709.782712893384);
  constexpr F top = F(kLargest) < largest ? F(kLargest) : largest;
  constexpr F bottom = sizeof(F) == 4 ? F(-87.33654) : F(-708.3964);
  constexpr F magic = sizeof(F) == 4 ? F(12582912) : F(6755399441055744);
  constexpr int mantissa = sizeof(F) == 4 ? 23 : 52;
  Vec<F> zero = fill<F>(0);
  Vec<F> x = t < bottom ? fill<F>(bottom) : t;
  x = x > top ? fill<F>(top) : x;
  Vec<F> z = x * F(kLog2e) + magic;
  Vec<F> p = exp2_fraction<F>(x * F(kLog2e) - (z - magic));
  Ints<F> exponent = (Ints<F>)z << mantissa;
  Vec<F> r = (Vec<F>)((Ints<F>)p + exponent);
  r = t < bottom ? zero : r;
  if constexpr (top == largest) r = t > top ? fill<F>(kInf<F>) : r;
  return t == t ? r : t;
}

// The weight exp(s - lse) of a softmax whose log-sum-exp is `lse` + `rest`, what its rounding left out. The largest score is not
// above it; one that is computed again may be, by rounding.
template <class F>
MK_INLINE Vec<F> weight(Vec<F> s, Vec<F> lse, Vec<F> rest) {
  return exp<F, 0>((s - lse) - rest);
}

// a = sigmoid(s) and 1 - a = sigmoid(-s); exactly 0 and 1 where the gate is saturated.
template <class F>
MK_INLINE void sigmoid(Vec<F> s, Vec<F>& a, Vec<F>& keep) {
  Vec<F> e = exp<F>(s > 0 ? -s : s);
  Vec<F> r = F(1) / (F(1) + e), er = e * r;
  a = s > 0 ? r : er;
  keep = s > 0 ? er : r;
}

#if defined(__AVX512F__)
// Both rounded to bfloat16, those of `a` first. For Isa::avx512bf16; by name, as files are compiled for processors that lack it.
MK_INLINE Vec<float> rounded(Vec<float> a, Vec<float> b) {
  Vec<float> x;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(x) : "v"(b), "v"(a));
  return x;
}
// The same lane by lane, side by side.
MK_INLINE Vec<float> pairs_of(Vec<float> a, Vec<float> b) {
  const __m512i low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i both = _mm512_add_epi32(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
  return (Vec<float>)_mm512_permutexvar_epi16(both, (__m512i)rounded(a, b));
}
#endif

// While alive, denormal numbers count as zero: products of gates run through them, a hundred times slower than anything.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

}  // namespace mk::MK_ISA
