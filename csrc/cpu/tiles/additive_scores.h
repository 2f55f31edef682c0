// Rows of additive scores:  s[i] = sum_a u_a tanh(q_a + k_ia) + mask_i.
#pragma once

#include "cpu/tiles/scores.h"
#include "cpu/tiles/tanh.h"

namespace mk::MK_ISA {

// A row of K numbers, padded with zeros to whole registers.
template <class F>
inline void padded_row(const char* row, DType dtype, int64_t K, F* out) {
  read_row<F>(row, dtype, K, out);
  for (int64_t c = K; c < Slots<F>::padded(K); ++c) out[c] = 0;
}

// s[0..block.n), padded to whole registers with -inf. Lanes run along K: query, u and the rows of keys are padded with
// zeros. Where `hidden` is given, it receives tanh(q + k_i), rows of padded(K).
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

}  // namespace mk::MK_ISA
