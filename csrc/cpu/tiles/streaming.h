// Results larger than the caches are written past them: an ordinary store first fetches the line that it is about to
// overwrite, which costs a result that is written once half as much traffic again. One core, in turns: gated_scan B=8
// T=2048 D=512 1.18x, softmax_read backward K=V=128 N=2^18 T=1 1.15x, T=8 1.11x.
#pragma once

#include "cpu/tiles/simd.h"

namespace mk::MK_ISA {

constexpr int64_t kFarBytes = int64_t(32) << 20;   // a memory from this size on is not found in a cache
constexpr int64_t kPastBytes = int64_t(16) << 20;  // a result from this size on: what made it wants room as well

// What comes from memory row after row is asked for so many bytes before its use: hardware stops reading ahead where a page ends.
constexpr int64_t kBytesAhead = 6144;

// Does a result of so many bytes, of rows so many bytes apart, go past the caches? Only whole aligned registers can.
inline bool goes_past(const void* first, int64_t stride, int64_t bytes) {
  return bytes >= kPastBytes && (reinterpret_cast<uintptr_t>(first) | uintptr_t(stride)) % MK_BYTES == 0;
}

struct Store {
  template <class F>
  MK_INLINE void operator()(F* p, Vec<F> v) const {
    store<F>(p, v);
  }
};

// Past the caches; p lies at a whole register.
struct Stream {
  MK_INLINE void operator()(float* p, Vec<float> v) const {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)v);
#elif defined(__x86_64__)
    _mm_stream_ps(p, (__m128)v);
#else
    store<float>(p, v);
#endif
  }
  MK_INLINE void operator()(double* p, Vec<double> v) const {
#if defined(__AVX512F__)
    _mm512_stream_pd(p, (__m512d)v);
#elif defined(__AVX2__)
    _mm256_stream_pd(p, (__m256d)v);
#elif defined(__x86_64__)
    _mm_stream_pd(p, (__m128d)v);
#else
    store<double>(p, v);
#endif
  }
};

// body(put), where put(p, v) stores a register. What went past the caches is there before whatever this thread does next.
template <class Body>
MK_INLINE void put_past(bool past, Body&& body) {
  if (!past) return body(Store{});
  body(Stream{});
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace mk::MK_ISA
