// Numbers in memory: float, and the two 16-bit types as bits. Kernels compute in float.
#pragma once

#include "cuda/tiles/platform.h"

namespace mk::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

MK_DEVICE bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

MK_DEVICE float to_float(float x) { return x; }
MK_DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
MK_DEVICE float to_float(f16 x) { return half_to_float(x.bits); }

template <class X>
MK_DEVICE X from_float(float x);
template <>
MK_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
MK_DEVICE bf16 from_float<bf16>(float x) {
  const uint32_t u = __float_as_uint(x);
  if (x != x) return {uint16_t(u >> 16 | 0x40)};            // keeps a NaN whose payload would round away
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};  // to nearest, ties to even
}
template <>
MK_DEVICE f16 from_float<f16>(float x) {
  return {half_from_float(x)};
}

// 16 bytes of X, the unit of copies.
template <class X>
struct alignas(16) Pack {
  static constexpr int size = 16 / int(sizeof(X));
  X x[size];
};

// Loads a number whose type is known at run time: for rows that are read a few times, not streamed.
MK_DEVICE float load(const char* row, DType d, int64_t i) {
  if (d == DType::f32) return reinterpret_cast<const float*>(row)[i];
  if (d == DType::bf16) return to_float(reinterpret_cast<const bf16*>(row)[i]);
  return to_float(reinterpret_cast<const f16*>(row)[i]);
}
MK_DEVICE void store(char* row, DType d, int64_t i, float x) {
  if (d == DType::f32) reinterpret_cast<float*>(row)[i] = x;
  else if (d == DType::bf16) reinterpret_cast<bf16*>(row)[i] = from_float<bf16>(x);
  else reinterpret_cast<f16*>(row)[i] = from_float<f16>(x);
}

// Does every row of every batch begin at a multiple of 16 bytes and consist of whole packs?
inline bool in_packs(const View& v, const Lead& l, int64_t columns) {
  int64_t bits = reinterpret_cast<intptr_t>(v.data) | v.row | columns * size_of(v.dtype);
  for (int d = 0; d < l.rank; ++d) bits |= v.lead[d];
  return bits % 16 == 0;
}

// A score in natural units: every finite mask stays finite, and only differences are multiplied by log2(e). The FMA is
// explicit, so that a score is the same rounded number in all kernels. Otherwise the compiler could fuse it into what
// is subtracted from it.
MK_DEVICE float score(float scale, float product, float added) { return __fmaf_rn(scale, product, added); }

// The mask's term in the score of slot i; `base`: its batch, or null.
MK_DEVICE float mask_at(const View& mask, const char* base, int64_t i) {
  if (base == nullptr) return 0;
  const char* at = base + i * mask.row;
  if (mask.dtype == DType::boolean) return *reinterpret_cast<const uint8_t*>(at) ? 0.f : -kInfinity;
  return load(at, mask.dtype, 0);
}

// Row t of the folded tokens of the batch that begins at `base`.
MK_DEVICE char* token_row(const View& v, const Lead& l, char* base, int64_t T, int64_t t) {
  if (t < T) return base + t * v.row;
  char* p = base + t % T * v.row;
  t /= T;
  MK_ROLLED
  for (int d = l.rank - 1; d >= 0; --d) {
    if (!l.shared[d]) continue;
    p += t % l.size[d] * v.lead[d];
    t /= l.size[d];
  }
  return p;
}

// Calls body<X>() with the type that `d` names.
template <class Body>
void with_type(DType d, Body&& body) {
  if (d == DType::f32) body.template operator()<float>();
  else if (d == DType::bf16) body.template operator()<bf16>();
  else body.template operator()<f16>();
}

}  // namespace mk::cuda
