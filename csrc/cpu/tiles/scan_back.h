// The way back of memory_scan through a block of slots and a chunk of tokens, six tokens at a time.
#pragma once

#include "cpu/tiles/scan_tiles.h"

namespace mk::MK_ISA {

// One block of slots and the tokens of a chunk, backward.
template <class F>
struct BackTile {
  int64_t slots, tokens, VP;
  const F *a, *keep, *p;     // [slot][scan_lanes(tokens)]
  const F *write, *d_reads;  // [token][VP]
  const F* starts;           // [group][slot][VP]
  F *g, *d_write;            // [slot][VP], [token][VP], added to
  F *da, *dp;                // [slot][scan_lanes(tokens)]
};

// out[i] = sum of the lanes of x[i]
template <class F, int N>
MK_INLINE void totals(const Vec<F>* x, F* out) {
  constexpr int W = kLanes<F>;
  if constexpr (N <= W) {
    Vec<F> all[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) all[i] = i < N ? x[i] : fill<F>(0);
    F lanes[W];
    store<F>(lanes, sums<F>(all));
    std::memcpy(out, lanes, N * sizeof(F));
  } else {
    for (int i = 0; i < N; ++i) out[i] = sum<F>(x[i]);
  }
}

template <class F, bool kReadFirst>
void back_group(const BackTile<F>& s, int64_t t0) {
  constexpr int W = kLanes<F>, U = kScanTokens;
  const int64_t L = scan_lanes<F>(s.tokens), VP = s.VP;
  for (int64_t j = 0; j < s.slots; ++j) {
    const F *a = s.a + j * L + t0, *keep = s.keep + j * L + t0, *p = s.p + j * L + t0;
    const F* start = s.starts + (t0 / U * s.slots + j) * VP;
    F* row = s.g + j * VP;
    Vec<F> d[2 * U];  // dp, then da
#pragma GCC unroll 16
    for (int u = 0; u < 2 * U; ++u) d[u] = fill<F>(0);
    for (int64_t x = 0; x < VP; x += W) {
      const F *write = s.write + t0 * VP + x, *d_reads = s.d_reads + t0 * VP + x;
      F* d_write = s.d_write + t0 * VP + x;
      Vec<F> v[U + 1], g = load<F>(row + x);
      v[0] = load<F>(start + x);
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        const Vec<F> written = a[u] * load<F>(write + u * VP);
        v[u + 1] = v[u] * keep[u] + written;
      }
#pragma GCC unroll 8
      for (int u = U - 1; u >= 0; --u) {
        const Vec<F> dr = load<F>(d_reads + u * VP);
        if constexpr (!kReadFirst) {
          d[u] += dr * v[u + 1];
          g += p[u] * dr;
        }
        d[U + u] += g * (load<F>(write + u * VP) - v[u]);
        store<F>(d_write + u * VP, load<F>(d_write + u * VP) + a[u] * g);
        g *= keep[u];
        if constexpr (kReadFirst) {
          d[u] += dr * v[u];
          g += p[u] * dr;
        }
      }
      store<F>(row + x, g);
    }
    F both[2 * U];
    if constexpr (2 * U <= W) {
      totals<F, 2 * U>(d, both);
    } else {
      totals<F, U>(d, both), totals<F, U>(d + U, both + U);
    }
    std::memcpy(s.dp + j * L + t0, both, U * sizeof(F));
    std::memcpy(s.da + j * L + t0, both + U, U * sizeof(F));
  }
}

template <class F>
void back_tile(const BackTile<F>& s, bool read_first) {
  for (int64_t t0 = round_up(s.tokens, kScanTokens); (t0 -= kScanTokens) >= 0;) {
    if (read_first) back_group<F, true>(s, t0);
    else back_group<F, false>(s, t0);
  }
}

}  // namespace mk::MK_ISA
