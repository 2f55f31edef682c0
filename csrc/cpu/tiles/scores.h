// Score tiles s[t, i] = scale <q_t, k_i> + mask_i. The scale is folded into the packed queries. Scores stay in natural
// units, and only their differences are multiplied by log2(e): a mask times log2(e) can overflow, and large scores
// would lose precision.
#pragma once

#include <new>

#include "cpu/tiles/gemm.h"
#include "cpu/tiles/slots.h"
#include "cpu/tiles/streaming.h"

namespace mk::MK_ISA {

constexpr int64_t kSlotBlock = 96;  // 96 x 64 floats = 24 KiB: a tile of scores stays in L1 beside the packed queries
template <class F>
constexpr int64_t kTokenTile = 256 / int64_t(sizeof(F));  // 64 floats: four AVX-512 registers of tokens

// With fewer tokens than this, half the lanes of a register of tokens would be idle: then lanes are slots.
template <class F>
MK_INLINE bool few_tokens(int64_t tokens) {
  return tokens <= kLanes<F> / 2;
}

// q[c][lane] = factor * query_{t0 + lane}[c], zero in lanes beyond n.
template <class F>
inline void pack_query(const TokenRows& query, int64_t t0, int64_t n, int64_t L, int64_t K, F factor, F* row, F* q) {
  pack_lanes<F>(n, L, K, factor, row, q,
                [&](int64_t t, F* buffer) { return row_as<F>(query.row(t0 + t), query.dtype, K, buffer); });
}

// q[t][c] = factor * query_{t0 + t}[c], rows padded with zeros to whole registers.
template <class F>
inline void rows_query(const TokenRows& query, int64_t t0, int64_t n, int64_t K, F factor, F* q) {
  const int64_t KP = Slots<F>::padded(K);
  for (int64_t t = 0; t < n; ++t, q += KP) {
    read_row<F>(query.row(t0 + t), query.dtype, K, q);
    for (int64_t c = 0; c < K; ++c) q[c] *= factor;
    for (int64_t c = K; c < KP; ++c) q[c] = 0;
  }
}

// S[slot][lane] += mask[slot]
template <class F>
inline void add_mask(const SlotBlock<F>& block, int64_t L, F* S) {
  if (block.mask == nullptr) return;
  for (int64_t r = 0; r < block.n; ++r) {
    const Vec<F> m = fill<F>(block.mask[r]);
    for (int64_t j = 0; j < L; j += kLanes<F>) store<F>(S + r * L + j, load<F>(S + r * L + j) + m);
  }
}

struct Nothing {
  void operator()() const {}
};

constexpr int64_t kGroup = 12;  // rows of a product between two runs of `between`

// Prefetch distance in rows. Rows whose distance ends beyond the block prefetch from row `then` on, counted from the
// first row of the block; with 0, from the rows directly after the block.
struct PrefetchRows {
  int64_t rows = 0, then = 0;
};

// Calls body(r, count, ahead) for the rows of a block: in groups if `between` does something, else in as few calls as
// possible.
template <class Between, class Body>
MK_INLINE void for_groups(int64_t n, PrefetchRows next, Between&& between, Body&& body) {
  const int64_t group = std::is_same_v<std::decay_t<Between>, Nothing> ? n : kGroup;
  const int64_t tail = next.then == 0 ? n : most(0, n - next.rows);
  for (int64_t r = 0, count; r < n; r += count, between()) {
    count = least(group, (r < tail ? tail : n) - r);
    body(r, count, r < tail ? next.rows : next.then - tail);
  }
}

// S[slot][lane], lanes are tokens: S = keys * q + mask. `between` runs after each group of rows, to prefetch what is
// needed next. `next`: what the product itself prefetches of the keys.
template <class F, class Between = Nothing>
inline void score_columns(const SlotBlock<F>& block, int64_t K, const F* q, int64_t L, F* S, Between&& between = {},
                          PrefetchRows next = {}) {
  for_groups(block.n, next, between, [&](int64_t r, int64_t count, int64_t ahead) {
    gemm(Gemm<F>{count, L, K, block.keys + r * block.ks, block.ks, 1, q, L, S + r * L, L, false, ahead * block.ks});
  });
  add_mask(block, L, S);
}

// W products at once: of TT tokens with W / TT rows each. Few tokens read each row from beginning to end, the order
// that hardware prefetch handles best; kBlocked or more tokens share their loads. `ahead` is the prefetch distance in
// elements (0: no prefetch). Zen 4, K=V=128, N=2^20, two cores on which torch.sum reads 34 GB/s, without prefetch:
// softmax_read of one token reads 33.4 GB/s row after row, 23.8 with sixteen rows in step. The gain of prefetching keys
// and values varies with time and with what else the process does: one token 1.2x to 1.4x interleaved with others on
// the same memory, 0.98x to 1.15x in a process of its own; four and eight tokens 1.4x.
constexpr int kBlocked = 4;

template <class F, int TT, bool kPrefetch>
MK_INLINE void dot_group(const F* rows, int64_t stride, int64_t padded, const F* x, int64_t ahead, F* out, int64_t ld) {
  constexpr int W = kLanes<F>, R = W / TT, kLine = 64 / int(sizeof(F));
  Vec<F> acc[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) acc[i] = fill<F>(0);
  if constexpr (TT < kBlocked) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const F* p = rows + i * stride;
#pragma GCC unroll 1
      for (int64_t c = 0; c < padded; c += W) {
        if (kPrefetch && c % kLine == 0) __builtin_prefetch(p + c + ahead, 0, 2);
        const Vec<F> row = load<F>(p + c);
#pragma GCC unroll 2
        for (int t = 0; t < TT; ++t) acc[t * R + i] += row * load<F>(x + t * padded + c);
      }
    }
  } else {
    for (int64_t c = 0; c < padded; c += W) {
      Vec<F> y[TT];
#pragma GCC unroll 4
      for (int t = 0; t < TT; ++t) y[t] = load<F>(x + t * padded + c);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const F* p = rows + i * stride + c;
        if (kPrefetch && c % kLine == 0) __builtin_prefetch(p + ahead, 0, 2);
        const Vec<F> row = load<F>(p);
#pragma GCC unroll 4
        for (int t = 0; t < TT; ++t) acc[t * R + i] += row * y[t];
      }
    }
  }
  F lanes[W];
  store<F>(lanes, sums<F>(acc));
#pragma GCC unroll 4
  for (int t = 0; t < TT; ++t) std::memcpy(out + t * ld, lanes + t * R, R * sizeof(F));
}

// The same for W rows.
template <class F, int TT>
inline void dot_groups(const F* rows, int64_t stride, int64_t padded, const F* x, int64_t ahead, F* out, int64_t ld) {
  constexpr int R = kLanes<F> / TT;
  for (int64_t r = 0; r < kLanes<F>; r += R) {
    if (ahead != 0) dot_group<F, TT, true>(rows + r * stride, stride, padded, x, ahead, out + r, ld);
    else dot_group<F, TT, false>(rows + r * stride, stride, padded, x, 0, out + r, ld);
  }
}

// out[t][slot] = <rows_slot, x_t>, lanes are slots, padded to whole registers with `rest`; x has padded rows. `ahead`:
// as above.
template <class F>
inline void dot_rows(int64_t slots, const F* rows, int64_t stride, int64_t width, const F* x, int64_t n, F rest, F* out,
                     int64_t ld, int64_t ahead = 0) {
  constexpr int W = kLanes<F>;
  const int64_t padded = Slots<F>::padded(width);
  int64_t r = 0;
  for (; r + W <= slots; r += W) {
    const F* p = rows + r * stride;
    int64_t t = 0;
    const auto once = [&] { return t == 0 ? ahead : 0; };
    if constexpr (W >= kBlocked) {
      for (; t + kBlocked <= n; t += kBlocked) {
        dot_groups<F, kBlocked>(p, stride, padded, x + t * padded, once(), out + t * ld + r, ld);
      }
    }
    for (; t + 2 <= n; t += 2) dot_groups<F, 2>(p, stride, padded, x + t * padded, once(), out + t * ld + r, ld);
    if (t < n) dot_groups<F, 1>(p, stride, padded, x + t * padded, once(), out + t * ld + r, ld);
  }
  if (r == slots) return;
  for (int64_t t = 0; t < n; ++t) {
    Vec<F> acc[W];
    for (int i = 0; i < W; ++i) acc[i] = fill<F>(0);
    for (int64_t i = 0; r + i < slots; ++i) {
      for (int64_t c = 0; c < padded; c += W)
        acc[i] += load<F>(rows + (r + i) * stride + c) * load<F>(x + t * padded + c);
    }
    store<F>(out + t * ld + r, sums<F>(acc));
    for (int64_t i = slots - r; i < W; ++i) out[t * ld + r + i] = rest;
  }
}

// S[t][slot], lanes are slots (padded with -inf), in rows of kSlotBlock. Needs padded key rows.
template <class F>
inline void score_rows(const SlotBlock<F>& block, int64_t K, const F* q, int64_t n, F* S) {
  dot_rows<F>(block.n, block.keys, block.ks, K, q, n, -kInf<F>, S, kSlotBlock, block.keys_ahead);
  if (block.mask == nullptr) return;
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t r = 0; r < block.n; ++r) S[t * kSlotBlock + r] += block.mask[r];
  }
}

// Memory for results that are kept between the passes of one call.
template <class F>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(count > 0 ? static_cast<F*>(allocate(bytes_of(size_t(count), sizeof(F)))) : nullptr) {}
  ~Buffer() { release(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  F* data() { return data_; }
  const F* data() const { return data_; }

 private:
  F* data_;
};

}  // namespace mk::MK_ISA
