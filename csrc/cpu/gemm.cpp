// C[M][L] (+)= A[M][k] B[k][L] for the small, cache-resident products inside the kernels.
//
// A tile of C, R rows by NV registers, stays in registers while k runs: per step NV loads of B and R broadcasts of A feed
// R * NV multiply-adds. Broadcasting A means that neither A nor its transpose is ever packed: keys and values are used as they
// lie in memory. AVX-512 has 32 registers: 6 x 4 accumulators, 4 of B and a broadcast; both multiply-add ports with a latency
// of 4 want at least 8 accumulators, which is why narrow tiles are taller.
#include "cpu/gemm.h"

#include "common/simd.h"
#include "common/view.h"

namespace mk::MK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidest = 4;
constexpr int kRows[5] = {0, 12, 12, 8, 6};
#elif defined(__aarch64__)
constexpr int kWidest = 4;
constexpr int kRows[5] = {0, 12, 8, 6, 6};
#else  // 16 registers
constexpr int kWidest = 2;
constexpr int kRows[5] = {0, 8, 6, 0, 0};
#endif

template <class F, int R, int NV>
void tile(const Gemm<F>& g, int64_t m, int64_t lane) {
  constexpr int W = kLanes<F>;
  Vec<F> acc[R][NV];
  F* c = g.c + m * g.ldc + lane;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[r][j] = g.accumulate ? load<F>(c + r * g.ldc + j * W) : fill<F>(0);
  }
  const F* a = g.a + m * g.rs;
  const F* b = g.b + lane;
  const int64_t rs = g.rs, cs = g.cs, ldb = g.ldb;
  for (int64_t k = 0; k < g.k; ++k) {
    Vec<F> bv[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) bv[j] = load<F>(b + j * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec<F> av = fill<F>(a[r * rs]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[r][j] += av * bv[j];
    }
    a += cs;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store<F>(c + r * g.ldc + j * W, acc[r][j]);
  }
}

// The last rows, fewer than a full tile: one instance per count, so that none is computed in vain.
template <class F, int NV, int R>
void last_rows(const Gemm<F>& g, int64_t m, int64_t lane) {
  if constexpr (R > 0) {
    if (g.M - m == R) tile<F, R, NV>(g, m, lane);
    else last_rows<F, NV, R - 1>(g, m, lane);
  }
}

template <class F, int NV>
int64_t columns(const Gemm<F>& g, int64_t lane) {
  constexpr int R = kRows[NV], width = NV * kLanes<F>;
  for (; lane + width <= g.L; lane += width) {
    int64_t m = 0;
    for (; m + R <= g.M; m += R) tile<F, R, NV>(g, m, lane);
    last_rows<F, NV, R - 1>(g, m, lane);
  }
  return lane;
}

template <class F>
void run(const Gemm<F>& g) {
  int64_t lane = columns<F, kWidest>(g, 0);
  if constexpr (kWidest == 4) {
    lane = columns<F, 3>(g, lane);
    lane = columns<F, 2>(g, lane);
  }
  columns<F, 1>(g, lane);
}

}  // namespace

void gemm(const Gemm<float>& g) { run(g); }
void gemm(const Gemm<double>& g) { run(g); }

}  // namespace mk::MK_ISA
