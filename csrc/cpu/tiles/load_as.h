// Registers of numbers of any dtype, as float or double, and back.
#pragma once

#include "cpu/tiles/rows.h"

namespace mk::MK_ISA {

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

// The first n lanes, the others zero; never reads beyond them.
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

#if defined(__AVX512F__)
// float_to_bf16 of every lane.
MK_INLINE __m512i bf16_bits(Vec<float> x) {
  const __m512i u = (__m512i)x, high = _mm512_srli_epi32(u, 16);
  const __m512i even = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, even), 16);
  return _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
}
#endif

// Two registers rounded to one of bfloat16 or float16, to nearest even.
template <DType O>
MK_INLINE Vec<float> narrowed(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT;
  __m256i low, high;
  if constexpr (O == DType::f16) {
    low = _mm512_cvtps_ph((__m512)a, nearest), high = _mm512_cvtps_ph((__m512)b, nearest);
  } else {
    low = _mm512_cvtepi32_epi16(bf16_bits(a)), high = _mm512_cvtepi32_epi16(bf16_bits(b));
  }
  return (Vec<float>)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#else
  constexpr int W = kLanes<float>;
  float lanes[2 * W];
  store<float>(lanes, a), store<float>(lanes + W, b);
  Vec<float> out;
  write_row<float>(lanes, 2 * W, O, reinterpret_cast<char*>(&out));
  return out;
#endif
}

}  // namespace mk::MK_ISA
