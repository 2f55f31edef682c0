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
constexpr int kRows[9] = {0, 12, 12, 8, 6, 0, 0, 0, 2};
#elif defined(__aarch64__)
constexpr int kWidest = 4;
constexpr int kRows[9] = {0, 12, 8, 6, 6, 0, 0, 0, 2};
#else  // 16 registers
constexpr int kWidest = 2;
constexpr int kRows[5] = {0, 8, 6, 0, 0};
#endif

// How the scalars of A lie: `rows`: along k (cs = 1), `columns`: along m (rs = 1). Known when compiled, one stride is left to
// keep in a register, and a step of four is one addition.
enum class Order { rows, columns };
constexpr int kUnroll = 4;

// Keeps the compiler from turning pointers that advance into a table of offsets, each loaded from the stack before it is used.
#define MK_OPAQUE(p) asm("" : "+r"(p))

template <class F, int R, int NV, Order O, int U>
MK_INLINE void steps(Vec<F> (&acc)[R][NV], const F*& a, int64_t stride, const F*& b, int64_t ldb) {
  constexpr int W = kLanes<F>;
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) {
    Vec<F> bv[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) bv[j] = load<F>(b + j * W);
    const F* row = a;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if (O == Order::rows && r % 3 == 0 && r > 0) {  // an address can add once or twice a register
        row += 3 * stride;
        MK_OPAQUE(row);
      }
      const Vec<F> av = fill<F>(O == Order::columns ? a[r] : row[r % 3 * stride]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[r][j] += av * bv[j];
    }
    a += O == Order::rows ? 1 : stride;
    b += ldb;
    MK_OPAQUE(a);
    MK_OPAQUE(b);
  }
}

// One register of lanes: every scalar of A is used once, straight from memory, and an operand whose address is a sum costs the front
// of the core a second slot. So every row has a pointer of its own. topk_search T=16 N=2^20 K=64, one core: 1.13x.
template <class F, int R>
MK_INLINE void lines(Vec<F> (&acc)[R][1], const F*& a, const F*& b, const Gemm<F>& g, int64_t& k, int line) {
  const F* rows[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) rows[r] = a + r * g.rs;
  for (; k + line <= g.k; k += line) {
    if (g.ahead != 0) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) __builtin_prefetch(rows[r] + g.ahead, 0, 2);
    }
#pragma GCC unroll 1
    for (int v = 0; v < line; v += kUnroll) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        const Vec<F> bv = load<F>(b);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) acc[r][0] += fill<F>(rows[r][u]) * bv;
        b += g.ldb;
        MK_OPAQUE(b);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        rows[r] += kUnroll;
        MK_OPAQUE(rows[r]);
      }
    }
  }
  a = rows[0];
}

template <class F, int R, int NV, Order O>
void tile(const Gemm<F>& g, int64_t m, int64_t lane) {
  constexpr int W = kLanes<F>;
  Vec<F> acc[R][NV];
  F* c = g.c + m * g.ldc + lane;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) acc[r][j] = g.accumulate ? load<F>(c + r * g.ldc + j * W) : fill<F>(0);
  }
  const F* a = g.a + m * g.rs;
  const F* b = g.b + lane;
  const int64_t stride = O == Order::rows ? g.rs : g.cs, ldb = g.ldb;
  int64_t k = 0;
  if constexpr (sizeof(F) == 4 && NV == kWidest && R == kRows[NV]) {
    for (; k + kUnroll <= g.k; k += kUnroll) steps<F, R, NV, O, kUnroll>(acc, a, stride, b, ldb);
  }
  constexpr int kLine = 64 / int(sizeof(F));
  if constexpr (O == Order::rows && NV == 1) {
    lines<F, R>(acc, a, b, g, k, kLine);
  } else if constexpr (O == Order::rows && NV == 2) {
    for (; g.ahead != 0 && k + kLine <= g.k; k += kLine) {
      for (int r = 0; r < R; ++r) __builtin_prefetch(a + r * stride + g.ahead, 0, 2);
#pragma GCC unroll 1
      for (int u = 0; u < kLine; ++u) steps<F, R, NV, O, 1>(acc, a, stride, b, ldb);
    }
  }
  for (; k < g.k; ++k) steps<F, R, NV, O, 1>(acc, a, stride, b, ldb);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store<F>(c + r * g.ldc + j * W, acc[r][j]);
  }
}

// The last rows, fewer than a full tile: one instance per count, so that none is computed in vain.
template <class F, int NV, Order O, int R>
void last_rows(const Gemm<F>& g, int64_t m, int64_t lane) {
  if constexpr (R > 0) {
    if (g.M - m == R) tile<F, R, NV, O>(g, m, lane);
    else last_rows<F, NV, O, R - 1>(g, m, lane);
  }
}

template <class F, int NV, Order O>
int64_t columns(const Gemm<F>& g, int64_t lane) {
  constexpr int R = kRows[NV], width = NV * kLanes<F>;
  for (; lane + width <= g.L; lane += width) {
    int64_t m = 0;
    for (; m + R <= g.M; m += R) tile<F, R, NV, O>(g, m, lane);
    last_rows<F, NV, O, R - 1>(g, m, lane);
  }
  return lane;
}

template <class F, Order O>
void run(const Gemm<F>& g) {
  int64_t lane = 0;
  if constexpr (kWidest == 4) {
    // One or two rows alone: a wide tile has accumulators enough and reads B in longer pieces.
    if (g.M <= kRows[8]) lane = columns<F, 8, O>(g, lane);
    lane = columns<F, 4, O>(g, lane);
    lane = columns<F, 3, O>(g, lane);
  }
  lane = columns<F, 2, O>(g, lane);
  columns<F, 1, O>(g, lane);
}

template <class F>
void choose(const Gemm<F>& g) {
  if (g.cs == 1) run<F, Order::rows>(g);
  else run<F, Order::columns>(g);
}

}  // namespace

void gemm(const Gemm<float>& g) { choose(g); }
void gemm(const Gemm<double>& g) { choose(g); }

}  // namespace mk::MK_ISA
