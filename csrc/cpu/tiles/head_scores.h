// Scores that are summed over heads, for a tile of tokens and a block of slots:
//   S[t, i] = sum_h w[t, h] relu(scale <q_th, k_i>) + mask_i
//
// The product of one head is a tile of scores in L1, added to the sum before the next head is multiplied: the order of
// the sum is fixed, and a block of keys comes from memory once for all heads.
#pragma once

#include "cpu/tiles/pairs.h"
#include "params/indexer_search.h"

namespace mk::MK_ISA {

// NaN where x is NaN.
template <class F>
MK_INLINE Vec<F> relu(Vec<F> x) {
  return x < fill<F>(0) ? fill<F>(0) : x;
}

// The queries of head h, token by token.
inline TokenRows head_queries(TokenRows query, const Heads& heads, int64_t h) {
  if (query) query.base += h * heads.stride;
  return query;
}

template <class F>
class HeadScores {
 public:
  // Lanes are tokens, or slots if there are `few`. `tile`: the most tokens of a tile. Without heads it has no memory.
  HeadScores(Arena& arena, const Heads* heads, int64_t tile, int64_t K, bool few)
      : H_(heads == nullptr ? 0 : heads->H),
        K_(K),
        width_(Slots<F>::padded(K)),
        q_(arena.take<F>(H_ * round_up(tile, kLanes<F>) * width_)),
        w_(arena.take<F>(H_ * round_up(tile, kLanes<F>))),
        product_(arena.take<F>(heads == nullptr ? 0 : kSlotBlock * (few ? H_ : round_up(tile, kLanes<F>)))) {}

  // Many tokens: reads the queries [h][c][lane] and weights [h][lane] of n tokens from t0 on. `row`: as in pack_query.
  void pack_columns(const ColumnScores<F>& columns, const Heads& heads, const TokenRows& weights, int64_t t0, int64_t n,
                    int64_t L, F* row) {
    for (int64_t h = 0; h < H_; ++h) {
      const TokenRows query = head_queries(columns.query, heads, h);
      of(columns, query).pack(t0, n, L, row, q_ + h * width_ * L);
      for (int64_t t = 0; t < L; ++t) w_[h * L + t] = t < n ? weight(weights, t0 + t, h) : F(0);
    }
  }
  // S[slot][lane]
  void columns(const ColumnScores<F>& columns, const SlotBlock<F>& block, int64_t L, F* S, PrefetchRows next) {
    constexpr int W = kLanes<F>;
    SlotBlock<F> plain = block;
    plain.mask = nullptr;
    std::fill_n(S, block.n * L, F(0));
    for (int64_t h = 0; h < H_; ++h) {
      columns.scores(plain, q_ + h * width_ * L, L, product_, h == 0 ? next : PrefetchRows{});
      for (int64_t j = 0; j < L; j += W) {
        const Vec<F> w = load<F>(w_ + h * L + j);
        for (int64_t at = j; at < block.n * L; at += L) {
          store<F>(S + at, load<F>(S + at) + w * relu<F>(load<F>(product_ + at)));
        }
      }
    }
    add_mask(block, L, S);
  }

  // Few tokens: queries [t][h][c] and weights [t][h].
  void pack_rows(const TokenRows& query, const Heads& heads, const TokenRows& weights, int64_t t0, int64_t n, F scale) {
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t h = 0; h < H_; ++h) {
        rows_query<F>(head_queries(query, heads, h), t0 + t, 1, K_, scale, q_ + (t * H_ + h) * width_);
        w_[t * H_ + h] = weight(weights, t0 + t, h);
      }
    }
  }
  // S[t][slot], as score_rows().
  void rows(const SlotBlock<F>& block, int64_t n, F* S) {
    constexpr int W = kLanes<F>;
    for (int64_t t = 0; t < n; ++t, S += kSlotBlock) {
      dot_rows<F>(block.n, block.keys, block.ks, K_, q_ + t * H_ * width_, H_, F(0), product_, kSlotBlock,
                  t == 0 ? block.keys_ahead : 0);
      for (int64_t r = 0; r < block.n; r += W) {
        Vec<F> sum = fill<F>(0);
        for (int64_t h = 0; h < H_; ++h) sum += w_[t * H_ + h] * relu<F>(load<F>(product_ + h * kSlotBlock + r));
        store<F>(S + r, sum);
      }
      for (int64_t r = 0; block.mask != nullptr && r < block.n; ++r) S[r] += block.mask[r];
      for (int64_t r = block.n; r < round_up(block.n, W); ++r) S[r] = -kInf<F>;
    }
  }

 private:
  static F weight(const TokenRows& weights, int64_t t, int64_t h) {
    F w;
    read_row<F>(weights.row(t) + h * size_of(weights.dtype), weights.dtype, 1, &w);
    return w;
  }
  // The scores of one head.
  static ColumnScores<F> of(const ColumnScores<F>& all, const TokenRows& query) {
    return {query, all.slots, all.K, all.factor, all.pairs};
  }
  int64_t H_, K_, width_;
  F *q_, *w_, *product_;
};

}  // namespace mk::MK_ISA
