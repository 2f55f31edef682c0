// C[M][L] (+)= A[M][k] B[k][L] for the small, cache-resident products inside the kernels.
//
// A tile of C, R rows by NV registers, stays in registers while k runs: per step NV loads of B and R broadcasts of A feed
// R * NV multiply-adds. Broadcasting A means that neither A nor its transpose is ever packed: keys and values are used as they
// lie in memory. AVX-512 has 32 registers: 6 x 4 accumulators, 4 of B and a broadcast; both multiply-add ports with a latency
// of 4 want at least 8 accumulators, which is why narrow tiles are taller.
#include "cpu/tiles/gemm.h"

#include "cpu/tiles/simd.h"
#include "params/view.h"

namespace mk::MK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidest = 4;
constexpr int kRows[9] = {0, 12, 12, 8, 6, 0, 0, 0, 3};
#elif defined(__aarch64__)
constexpr int kWidest = 4;
constexpr int kRows[9] = {0, 12, 8, 6, 6, 0, 0, 0, 2};
#else  // 16 registers
constexpr int kWidest = 2;
constexpr int kRows[5] = {0, 8, 6, 0, 0};
#endif

// How the scalars of A lie: `rows`: along k (cs = 1), `columns`: along m (rs = 1).
enum class Order { rows, columns };
constexpr int kUnroll = 4;
constexpr int kFewRows = 8;

// Keeps the compiler from turning pointers that advance into a table of offsets, each loaded from the stack before it is used.
#define MK_OPAQUE(p) asm("" : "+r"(p))

// Rows of A have a pointer each, columns share one: no address is a sum, which would cost the front of the core a second slot where
// a scalar is used once, and four steps are one addition for each pointer.
template <class F, int R, Order O>
struct Left {
  static constexpr int kPointers = O == Order::rows ? R : 1;
  const F* at[kPointers];

  MK_INLINE Left(const F* a, int64_t stride) {
#pragma GCC unroll 16
    for (int r = 0; r < kPointers; ++r) at[r] = a + r * stride;
  }
};

// An element: a number, or a pair of bfloat16 in the bits of a float, perhaps at an odd address.
template <class F>
MK_INLINE F element(const F* p) {
  F x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

template <Of E, class F>
MK_INLINE void multiply_add(Vec<F>& acc, Vec<F> a, Vec<F> b) {
#if defined(__AVX512F__)
  // By name: the file is compiled for processors that lack it.
  if constexpr (E == Of::pairs) asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(b), "v"(a));
  else
#endif
    acc += a * b;
}

template <Of E, class F, int R, int NV, Order O, int U, bool kAsk = false>
MK_INLINE void steps(Vec<F> (&acc)[R][NV], Left<F, R, O>& a, int64_t stride, const F*& b, int64_t ldb, int64_t ahead = 0) {
  constexpr int W = kLanes<F>;
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) {
    Vec<F> bv[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      if (kAsk && j * MK_BYTES % 64 == 0) __builtin_prefetch(b + j * W + ahead, 0, 2);
      bv[j] = load<F>(b + j * W);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<F> av = fill<F>(element(O == Order::rows ? a.at[r] + u : a.at[0] + r));
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) multiply_add<E, F>(acc[r][j], av, bv[j]);
    }
    if (O == Order::columns) {
      a.at[0] += stride;
      MK_OPAQUE(a.at[0]);
    }
    b += ldb;
    MK_OPAQUE(b);
  }
  if (O == Order::rows) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      a.at[r] += U;
      MK_OPAQUE(a.at[r]);
    }
  }
}

// A line of each row of A at a time, after the line that lies `ahead` is asked for: into L1 by a wide tile, which takes long enough
// over a line (Zen 4, keys from memory, K=64 or 128: 1.02x; of a narrow tile 0.85x).
template <Of E, class F, int R, int NV>
MK_INLINE void lines(Vec<F> (&acc)[R][NV], Left<F, R, Order::rows>& a, const F*& b, const Gemm<F>& g, int64_t& k) {
  constexpr int kLine = 64 / int(sizeof(F));
  for (; k + kLine <= g.k; k += kLine) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) __builtin_prefetch(a.at[r] + g.ahead, 0, NV == 4 ? 3 : 2);
#pragma GCC unroll 1
    for (int u = 0; u < kLine; u += kUnroll) steps<E, F, R, NV, Order::rows, kUnroll>(acc, a, g.rs, b, g.ldb);
  }
}

template <Of E, class F, int R, int NV, Order O>
void tile(const Gemm<F>& g, int64_t m, int64_t lane, F factor) {
  constexpr int W = kLanes<F>;
  Vec<F> acc[R][NV];
  F* c = g.c + m * g.ldc + lane;
  const bool early = g.accumulate && !g.apart;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) acc[r][j] = early ? load<F>(c + r * g.ldc + j * W) : fill<F>(0);
  }
  const F* b = g.b + lane;
  const int64_t stride = O == Order::rows ? g.rs : g.cs, ldb = g.ldb;
  Left<F, R, O> a(g.a + m * g.rs, stride);
  int64_t k = 0;
  if constexpr (O == Order::rows && (NV <= 2 || R == kRows[NV])) {
    if (g.ahead != 0) lines<E, F, R, NV>(acc, a, b, g, k);
  }
  if constexpr (E == Of::numbers && O == Order::rows && NV >= kWidest) {
    if (g.ahead_b != 0 && m == 0) {
      for (; k + kUnroll <= g.k; k += kUnroll) steps<E, F, R, NV, O, kUnroll, true>(acc, a, stride, b, ldb, g.ahead_b);
    }
  }
  for (; k + kUnroll <= g.k; k += kUnroll) steps<E, F, R, NV, O, kUnroll>(acc, a, stride, b, ldb);
  for (; k < g.k; ++k) steps<E, F, R, NV, O, 1>(acc, a, stride, b, ldb);
  if (__builtin_expect(g.apart, 0)) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[r][j] += load<F>(c + r * g.ldc + j * W);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      if (E == Of::pairs && !g.accumulate) acc[r][j] *= factor;
      store<F>(c + r * g.ldc + j * W, acc[r][j]);
    }
  }
}

// The last rows, fewer than a full tile: one instance per count, so that none is computed in vain.
template <Of E, class F, int NV, Order O, int R>
void last_rows(const Gemm<F>& g, int64_t m, int64_t lane, F factor) {
  if constexpr (R > 0) {
    if (g.M - m == R) tile<E, F, R, NV, O>(g, m, lane, factor);
    else last_rows<E, F, NV, O, R - 1>(g, m, lane, factor);
  }
}

template <Of E, class F, int NV, Order O>
int64_t columns(const Gemm<F>& g, int64_t lane, F factor) {
  constexpr int R = kRows[NV], width = NV * kLanes<F>;
  for (; lane + width <= g.L; lane += width) {
    int64_t m = 0;
    for (; m + R <= g.M; m += R) tile<E, F, R, NV, O>(g, m, lane, factor);
    last_rows<E, F, NV, O, R - 1>(g, m, lane, factor);
  }
  return lane;
}

template <Of E, class F, Order O>
void run(const Gemm<F>& g, F factor) {
  int64_t lane = 0;
  if constexpr (kWidest == 4) {
    // Few rows alone: a wide tile has accumulators enough and reads B row after row, the order of memory.
    if (E == Of::numbers && g.M <= kFewRows) lane = columns<Of::numbers, F, 8, O>(g, lane, factor);
    lane = columns<E, F, 4, O>(g, lane, factor);
    lane = columns<E, F, 3, O>(g, lane, factor);
  }
  lane = columns<E, F, 2, O>(g, lane, factor);
  columns<E, F, 1, O>(g, lane, factor);
}

template <Of E, class F>
void choose(const Gemm<F>& g, F factor = 1) {
  if (g.cs == 1) run<E, F, Order::rows>(g, factor);
  else run<E, F, Order::columns>(g, factor);
}

}  // namespace

void gemm(const Gemm<float>& g) { choose<Of::numbers>(g); }
void gemm(const Gemm<double>& g) { choose<Of::numbers>(g); }
#if defined(__AVX512F__)
void gemm_pairs(const Gemm<float>& g, float factor) { choose<Of::pairs>(g, factor); }
#endif

}  // namespace mk::MK_ISA
