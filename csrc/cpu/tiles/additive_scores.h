// Rows of additive scores:  s[i] = sum_a u_a tanh(q_a + k_ia) + mask_i.
#pragma once

#include "cpu/tiles/ranges.h"
#include "cpu/tiles/tanh.h"

namespace mk::MK_ISA {

// A row of K numbers, padded with zeros to whole registers.
template <class F>
inline void padded_row(const char* row, DType dtype, int64_t K, F* out) {
  read_row<F>(row, dtype, K, out);
  for (int64_t c = K; c < Slots<F>::padded(K); ++c) out[c] = 0;
}

// Computes s[0..block.n), padded to whole registers with -inf. Lanes run along K: query, u and the rows of keys are
// padded with zeros. `hidden`, if given, receives tanh(q + k_i) in rows of padded(K).
template <class F>
inline void additive_row(const SlotBlock<F>& block, int64_t K, const F* q, const F* u, F* s, F* hidden) {
  constexpr int W = kLanes<F>;
  const int64_t KP = Slots<F>::padded(K);
  for (int64_t r = 0; r < block.n; r += W) {
    const int64_t live = least(W, block.n - r);
    Vec<F> acc[W];
    for (int64_t i = 0; i < live; ++i) {
      const F* key = block.keys + (r + i) * block.ks;
      Vec<F> a = fill<F>(0);
      for (int64_t c = 0; c < KP; c += W) {
        const Vec<F> h = tanh<F>(load<F>(q + c) + load<F>(key + c));
        if (hidden != nullptr) store<F>(hidden + (r + i) * KP + c, h);
        a += h * load<F>(u + c);
      }
      acc[i] = a;
    }
    for (int64_t i = live; i < W; ++i) acc[i] = fill<F>(0);
    store<F>(s + r, sums<F>(acc));
    if (block.mask != nullptr) {
      for (int64_t i = 0; i < live; ++i) s[r + i] += block.mask[r + i];
    }
    for (int64_t i = live; i < W; ++i) s[r + i] = -kInf<F>;
  }
}

// The same of rows `r` of the block; s is -inf elsewhere. Writes up to a register beyond s[r.stop).
template <class F>
inline void additive_part(const SlotBlock<F>& block, int64_t first, RowSpan r, int64_t K, const F* q, const F* u, F* s,
                          F* hidden) {
  const BlockPart<F> part(block, first, r);
  const int64_t KP = Slots<F>::padded(K), end = round_up(block.n, kLanes<F>);
  additive_row<F>(part.block, K, q, u, s + r.first, hidden == nullptr ? nullptr : hidden + r.first * KP);
  std::fill(s, s + r.first, -kInf<F>);
  std::fill(s + r.stop, s + most(r.stop, end), -kInf<F>);
}

}  // namespace mk::MK_ISA
