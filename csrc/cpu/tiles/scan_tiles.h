// What both directions of memory_scan share: tiles of gates with tokens as lanes, and the recurrence of a block of slots.
#pragma once

#include "cpu/tiles/write_tiles.h"
#include "params/memory_scan.h"

namespace mk::MK_ISA {

constexpr int64_t kScanSlots = 32;  // three tiles of gates and the values of a block stay near L1
// Tokens that pass over a slot while it is in registers: their reads and writes are there too. Divides kChunkTokens.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kScanTokens = 6;
constexpr int kScanRegisters = 2;
#else  // 16 registers
constexpr int kScanTokens = 6;
constexpr int kScanRegisters = 1;
#endif
static_assert(kChunkTokens % kScanTokens == 0);

// The tokens of a chunk as lanes: whole registers, and whole groups of kScanTokens.
template <class F>
int64_t scan_lanes(int64_t n) {
  return round_up(round_up(n, kScanTokens), kLanes<F>);
}

// q[k][token], times the scale.
template <class F>
void pack_chunk(const TokenChunk<F>& c, int64_t K, double scale, F* q) {
  pack_lanes<F>(c.n, scan_lanes<F>(c.n), K, F(scale), nullptr, q, [&](int64_t t, F*) { return c.query + t * c.qs; });
}

// out[t][VP] = row t, zeros behind the width and in the rows that fill the last group.
template <class F>
void pad_rows(const F* rows, int64_t stride, int64_t n, int64_t V, F* out) {
  const int64_t VP = Slots<F>::padded(V);
  for (int64_t t = 0; t < round_up(n, kScanTokens); ++t, out += VP) {
    const int64_t width = t < n ? V : 0;
    if (width > 0) std::memcpy(out, rows + t * stride, size_t(V) * sizeof(F));
    for (int64_t v = width; v < VP; ++v) out[v] = 0;
  }
}

// a[slot][token] and keep = 1 - a; tokens past the last one write nothing.
template <class F>
void scan_gates(const SlotBlock<F>& block, int64_t K, const F* q, int64_t n, F* a, F* keep) {
  const int64_t L = scan_lanes<F>(n);
  score_columns<F>(block, K, q, L, a);
  for (int64_t j = 0; j < block.n; ++j) {
    F *gate = a + j * L, *rest = keep + j * L;
    for (int64_t l = 0; l < L; l += kLanes<F>) {
      Vec<F> open, left;
      sigmoid<F>(load<F>(gate + l), open, left);
      store<F>(gate + l, open), store<F>(rest + l, left);
    }
    for (int64_t t = n; t < L; ++t) gate[t] = 0, rest[t] = 1;
  }
}

enum class Read { nothing, after, before };  // what a token reads: memory after its own write, or before

// A block of slots and the tokens of a chunk.
template <class F>
struct ScanTile {
  int64_t slots, tokens, VP;
  const F *a, *keep, *p;  // [slot][scan_lanes(tokens)]
  const F* write;         // [token][VP]
  F *values, *reads;      // [slot][VP], and [token][VP], to which p v is added
  F* starts = nullptr;    // where wanted: the values before each group of tokens, [group][slot][VP]
  bool assign = false;    // the first block: reads hold nothing yet
};

// Registers [x, x + NV) of the columns through one group of tokens: for every slot v <- v keep + a w, r += p v.
template <class F, int NV, Read R>
void scan_columns(const ScanTile<F>& s, int64_t t0, int64_t x) {
  constexpr int W = kLanes<F>, U = kScanTokens;
  const int64_t L = scan_lanes<F>(s.tokens);
  Vec<F> w[U][NV], r[U][NV];
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) {
      w[u][i] = load<F>(s.write + (t0 + u) * s.VP + x + i * W);
      if constexpr (R != Read::nothing)
        r[u][i] = s.assign ? fill<F>(0) : load<F>(s.reads + (t0 + u) * s.VP + x + i * W);
    }
  }
  for (int64_t j = 0; j < s.slots; ++j) {
    const F *a = s.a + j * L + t0, *keep = s.keep + j * L + t0, *p = s.p + j * L + t0;
    F* row = s.values + j * s.VP + x;
    Vec<F> v[NV];
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) v[i] = load<F>(row + i * W);
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) {
        if constexpr (R == Read::before) r[u][i] += p[u] * v[i];
        const Vec<F> written = a[u] * w[u][i];  // beside the chain through v, which is one multiply-add long
        v[i] = v[i] * keep[u] + written;
        if constexpr (R == Read::after) r[u][i] += p[u] * v[i];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) store<F>(row + i * W, v[i]);
  }
  if constexpr (R != Read::nothing) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) store<F>(s.reads + (t0 + u) * s.VP + x + i * W, r[u][i]);
    }
  }
}

template <class F, Read R>
void scan_tile(const ScanTile<F>& s) {
  constexpr int NV = kScanRegisters, W = kLanes<F>;
  for (int64_t t0 = 0; t0 < s.tokens; t0 += kScanTokens) {
    if (s.starts != nullptr) {
      std::memcpy(s.starts + t0 / kScanTokens * s.slots * s.VP, s.values, size_t(s.slots * s.VP) * sizeof(F));
    }
    int64_t x = 0;
    for (; x + NV * W <= s.VP; x += NV * W) scan_columns<F, NV, R>(s, t0, x);
    for (; x < s.VP; x += W) scan_columns<F, 1, R>(s, t0, x);
  }
}

// The values of a block as rows of F, [slot][VP] from `to` on.
template <class F>
void take_values(const SlotBlock<F>& block, int64_t V, F* to) {
  const int64_t VP = Slots<F>::padded(V);
  for (int64_t j = 0; j < block.n; ++j, to += VP) {
    std::memcpy(to, block.values + j * block.vs, size_t(V) * sizeof(F));
    for (int64_t v = V; v < VP; ++v) to[v] = 0;
  }
}

}  // namespace mk::MK_ISA
