// Converts rows of any dtype to and from the type that a kernel computes in.
#pragma once

#include "cpu/tiles/simd.h"
#include "params/view.h"

namespace mk::MK_ISA {

MK_INLINE float from_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
MK_INLINE uint32_t to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x0400) {  // zero and denormals: rest * 2^-24
    float f = float(rest) * 5.9604644775390625e-08f;
    return from_bits(sign | to_bits(f));
  }
  return from_bits(sign | ((rest << 13) + 0x38000000));
}
inline uint16_t float_to_half(float f) {
  const uint32_t u = to_bits(f), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (rest >= 0x47800000) return uint16_t(sign | 0x7c00);
  if (rest < 0x38800000) {  // below the smallest normal: the addition rounds to a multiple of 2^-24
    return uint16_t(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000));
  }
  return uint16_t(sign | (rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13);
}
MK_INLINE uint16_t float_to_bf16(float f) {
  const uint32_t u = to_bits(f);
  const uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return uint16_t((u & 0x7fffffff) > 0x7f800000 ? (u >> 16 | 0x40) : rounded);
}

// One register of 8-bit numbers as float: int8, or float8 e4m3fn, which has no infinity and NaN as its largest
// magnitude.
template <DType D>
MK_INLINE Vec<float> load_compressed(const char* p) {
  using Lanes = Ints<float>;
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const auto x = (Lanes)(D == DType::i8 ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const auto x = (Lanes)(D == DType::i8 ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
  Lanes x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = D == DType::i8 ? int8_t(p[i]) : uint8_t(p[i]);
#endif
  if constexpr (D == DType::i8) {
    return __builtin_convertvector(x, Vec<float>);
  } else {
#if defined(__AVX512F__)
    // The bits are those of a float16 of 1/256 the size, whose denormals the conversion knows.
    const __m256i t = _mm256_cvtepu8_epi16(bytes);
    const __m256i size = _mm256_and_si256(_mm256_slli_epi16(t, 7), _mm256_set1_epi16(0x3f80));
    const __m256i half = _mm256_or_si256(size, _mm256_and_si256(_mm256_slli_epi16(t, 8), _mm256_set1_epi16(-0x8000)));
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(size, _mm256_set1_epi16(0x3f80));
    const __m512 number = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256));
    return (Vec<float>)_mm512_mask_mov_ps(number, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
#else
    const Lanes rest = x & 0x7f, sign = (x & 0x80) << 24, normal = (rest << 20) + (120 << 23), nan = x * 0 + 0x7fc00000;
    // A denormal is a multiple of 2^-9. A product gives it even where denormal floats count as 0.
    const auto tiny = (Lanes)(__builtin_convertvector(rest, Vec<float>) * 0x1p-9f);
    return (Vec<float>)(sign | (rest == 0x7f ? nan : rest < 8 ? tiny : normal));
#endif
  }
}

// dst[0..n) = factor * src[0..n), for 8-bit numbers
template <class F, DType D>
inline void read_compressed(const char* src, int64_t n, F factor, F* __restrict dst) {
  constexpr int W = kLanes<float>;
  for (int64_t i = 0; i < n; i += W) {
    const int64_t live = least(W, n - i);
    if (sizeof(F) == 4 && live == W) {
      store<float>(reinterpret_cast<float*>(dst + i), float(factor) * load_compressed<D>(src + i));
      continue;
    }
    char bytes[W] = {};
    std::memcpy(bytes, src + i, size_t(live));
    float lanes[W];
    store<float>(lanes, load_compressed<D>(bytes));
    for (int64_t l = 0; l < live; ++l) dst[i + l] = factor * F(lanes[l]);
  }
}
template <class F>
inline void read_compressed_row(const char* src, DType dtype, int64_t n, F factor, F* __restrict dst) {
  if (dtype == DType::i8) read_compressed<F, DType::i8>(src, n, factor, dst);
  else read_compressed<F, DType::e4m3>(src, n, factor, dst);
}

// dst[0..n) = src[0..n)
template <class F>
inline void read_row(const char* src, DType dtype, int64_t n, F* __restrict dst) {
  if (is_compressed(dtype)) {
    read_compressed_row<F>(src, dtype, n, F(1), dst);
  } else if constexpr (sizeof(F) == 8) {
    std::memcpy(dst, src, size_t(n) * 8);
  } else if (dtype == DType::f32) {
    std::memcpy(dst, src, size_t(n) * 4);
  } else if (dtype == DType::bf16) {
    const auto* p = reinterpret_cast<const uint16_t*>(src);
    for (int64_t i = 0; i < n; ++i) dst[i] = from_bits(uint32_t(p[i]) << 16);
  } else {
    const auto* p = reinterpret_cast<const uint16_t*>(src);
    int64_t i = 0;
#if defined(__AVX2__)
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
    }
#endif
    for (; i < n; ++i) dst[i] = half_to_float(p[i]);
  }
}

template <class F>
inline void write_row(const F* __restrict src, int64_t n, DType dtype, char* dst) {
  if constexpr (sizeof(F) == 8) {
    std::memcpy(dst, src, size_t(n) * 8);
  } else if (dtype == DType::f32) {
    std::memcpy(dst, src, size_t(n) * 4);
  } else if (dtype == DType::bf16) {
    auto* p = reinterpret_cast<uint16_t*>(dst);
    for (int64_t i = 0; i < n; ++i) p[i] = float_to_bf16(src[i]);
  } else {
    auto* p = reinterpret_cast<uint16_t*>(dst);
    int64_t i = 0;
#if defined(__AVX2__)
    for (; i + 8 <= n; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    for (; i < n; ++i) p[i] = float_to_half(src[i]);
  }
}

// The same row as F; returned in place if it already has that type.
template <class F>
inline const F* row_as(const char* src, DType dtype, int64_t n, F* buffer) {
  if ((sizeof(F) == 4) == (dtype == DType::f32)) {
    if (sizeof(F) == 4 || dtype == DType::f64) return reinterpret_cast<const F*>(src);
  }
  read_row<F>(src, dtype, n, buffer);
  return buffer;
}

template <class F>
constexpr DType kOwn = sizeof(F) == 4 ? DType::f32 : DType::f64;

// out[c * lanes + r] = factor * row_r[c]: rows become lanes. Lanes are rounded up to whole registers; the rest is 0.
// row(r, buffer) may convert row r into `buffer`, which has room for a register of rows. With `kBits`, bits are copied
// without arithmetic: they may be two 16-bit numbers, at any address.
template <class F, bool kBits = false, class Row>
inline void pack_lanes(int64_t rows, int64_t lanes, int64_t cols, F factor, F* buffer, F* out, Row&& row) {
  constexpr int W = kLanes<F>;
  for (int64_t r = 0; r < lanes; r += W, out += W) {
    const int64_t live = least(W, most(0, rows - r));
    const F* p[W];
    for (int64_t i = 0; i < live; ++i) p[i] = row(r + i, buffer == nullptr ? nullptr : buffer + i * cols);
    int64_t c = 0;
    for (; c + W <= cols; c += W) {
      Vec<F> x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i)
        x[i] = i >= live ? fill<F>(0) : kBits ? load<F>(p[i] + c) : factor * load<F>(p[i] + c);
      transpose<F>(x);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store<F>(out + (c + i) * lanes, x[i]);
    }
    for (; c < cols; ++c) {
      for (int64_t i = 0; i < W; ++i) {
        F x = 0;
        if (i < live) std::memcpy(&x, p[i] + c, sizeof x);
        out[c * lanes + i] = kBits ? x : factor * x;
      }
    }
  }
}

// The inverse: out[r * stride + c] = columns[c * lanes + r], for all lanes, in whole registers.
template <class F>
inline void unpack_lanes(const F* columns, int64_t lanes, int64_t width, F* out, int64_t stride) {
  constexpr int W = kLanes<F>;
  for (int64_t r = 0; r < lanes; r += W, columns += W, out += W * stride) {
    int64_t c = 0;
    for (; c + W <= width; c += W) {
      Vec<F> x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) x[i] = load<F>(columns + (c + i) * lanes);
      transpose<F>(x);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store<F>(out + i * stride + c, x[i]);
    }
    for (; c < width; ++c) {
      for (int64_t i = 0; i < W; ++i) out[i * stride + c] = columns[c * lanes + i];
    }
  }
}

}  // namespace mk::MK_ISA
