// Results larger than the caches are written with non-temporal stores. An ordinary store first loads the cache line
// that it overwrites, which adds half as much traffic to a result that is written once. One core, interleaved runs:
// gated_scan B=8 T=2048 D=512 1.18x, softmax_read backward K=V=128 N=2^18 T=1 1.15x, T=8 1.11x.
#pragma once

#include "cpu/tiles/simd.h"

namespace mk::MK_ISA {

constexpr int64_t kFarBytes = int64_t(32) << 20;          // memory of this size or more is not found in a cache
constexpr int64_t kNonTemporalBytes = int64_t(16) << 20;  // of a result, whose inputs take room in the cache, too

// Prefetch distance in bytes for rows that come from memory, since hardware prefetch stops at the end of a page.
constexpr int64_t kPrefetchBytes = 6144;

// Does a result of so many bytes, in rows `stride` bytes apart, take non-temporal stores? They need whole aligned
// registers.
inline bool is_non_temporal(const void* first, int64_t stride, int64_t bytes) {
  return bytes >= kNonTemporalBytes && (reinterpret_cast<uintptr_t>(first) | uintptr_t(stride)) % MK_BYTES == 0;
}

struct Store {
  template <class F>
  MK_INLINE void operator()(F* p, Vec<F> v) const {
    store<F>(p, v);
  }
};

// Non-temporal store; p is aligned to a register.
struct NonTemporalStore {
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

// Calls body(put), where put(p, v) stores a register. Non-temporal stores come before whatever this thread does next.
template <class Body>
MK_INLINE void with_stores(bool non_temporal, Body&& body) {
  if (!non_temporal) return body(Store{});
  body(NonTemporalStore{});
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace mk::MK_ISA
