// The best k of a stream of scores, for a tile of tokens.
//
// A candidate is one integer, (score, index) in an order that is total: NaN above all, then larger scores, then smaller
// indices. So the best k are the same whatever the order in which slots are looked at, and whatever threshold kept
// others out, as long as no threshold is too high. A token's candidates are appended to its buffer; when it is full the
// best k are kept and the worst of them becomes the threshold.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <functional>

#include "common/parallel.h"
#include "common/simd.h"

namespace mk::MK_ISA {

// Scores as unsigned integers in the same order, NaN the largest; -0 and +0 are one.
template <class F>
using Rank = std::conditional_t<sizeof(F) == 4, uint32_t, uint64_t>;

template <class F>
MK_INLINE Rank<F> rank_of(F score) {
  constexpr Rank<F> top = Rank<F>(1) << (8 * sizeof(F) - 1);
  const Rank<F> u = std::bit_cast<Rank<F>>(score + F(0));
  const Rank<F> ordered = u & top ? ~u : u | top;
  return score == score ? ordered : ~Rank<F>(0);
}
template <class F>
MK_INLINE F score_of(Rank<F> rank) {
  constexpr Rank<F> top = Rank<F>(1) << (8 * sizeof(F) - 1);
  if (rank == ~Rank<F>(0)) return std::numeric_limits<F>::quiet_NaN();
  return std::bit_cast<F>(rank & top ? rank & ~top : ~rank);
}

// 32 bits of index beside a float where they are enough, 64 otherwise.
template <class F, bool wide>
struct Candidate {
  using Index = std::conditional_t<wide, uint64_t, uint32_t>;
  using Key = std::conditional_t<wide, unsigned __int128, uint64_t>;
  static constexpr int kBits = 8 * sizeof(Index);
  static Key key(F score, int64_t index) { return Key(rank_of<F>(score)) << kBits | Index(~Index(index)); }
  static F score(Key key) { return score_of<F>(Rank<F>(key >> kBits)); }
  static int64_t index(Key key) { return int64_t(Index(~Index(key))); }
};

// The lanes whose score is above the threshold or NaN.
template <class F>
MK_INLINE uint32_t above(Vec<F> s, Vec<F> threshold) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) return _mm512_cmp_ps_mask((__m512)s, (__m512)threshold, _CMP_NLE_UQ);
  else return _mm512_cmp_pd_mask((__m512d)s, (__m512d)threshold, _CMP_NLE_UQ);
#else
  return bits<F>(~(s <= threshold));
#endif
}

template <class F, bool wide>
class Board {
 public:
  using C = Candidate<F, wide>;
  using Key = typename C::Key;

  // Room for `tokens` tokens. `k`: how many to keep, at most the number of slots.
  static int64_t capacity(int64_t k) { return k + most(k, 64); }
  Board(Arena& arena, int64_t tokens, int64_t k)
      : k_(k),
        capacity_(capacity(k)),
        tokens_(tokens),
        keys_(arena.take<Key>(tokens * capacity_)),
        limit_(arena.take<Key>(tokens)),
        n_(arena.take<int64_t>(tokens)),
        strict_(arena.take<F>(tokens)),
        loose_(arena.take<F>(tokens)),
        floor_(arena.take<F>(tokens)),
        now_(arena.take<F>(tokens)),
        at_(arena.take<typename C::Index>(tokens)) {}

  void clear() {
    for (int64_t t = 0; t < tokens_; ++t) {
      limit_[t] = 0, n_[t] = 0, at_[t] = 0;
      strict_[t] = loose_[t] = floor_[t] = now_[t] = -kInf<F>;
    }
  }

  // Thresholds found by others for the same `n` tokens in other slots, one rank per token: a candidate below is not
  // needed.
  void share(std::atomic<Rank<F>>* ranks, int64_t n) {
    shared_ = ranks;
    for (int64_t t = 0; t < n; ++t) {
      const F other = below(score_of<F>(ranks[t].load(std::memory_order_relaxed)));
      if (other > floor_[t]) floor_[t] = other;
    }
  }

  // Before scores of slots from `first` on: a tie with the threshold enters only if it may lie before the threshold's
  // slot.
  void begin(int64_t first) {
    first_ = typename C::Index(first);
    for (int64_t t = 0; t < tokens_; ++t) {
      const F own = at_[t] < first_ ? strict_[t] : loose_[t];
      now_[t] = own > floor_[t] ? own : floor_[t];
    }
  }
  // Scores that are not above it need not be offered.
  const F* thresholds() const { return now_; }

  void offer(int64_t t, F score, int64_t index) {
    const Key key = C::key(score, index);
    if (key <= limit_[t]) return;
    keys_[t * capacity_ + n_[t]++] = key;
    if (n_[t] == capacity_) keep(t);
  }

  // The best of token t, at most k, in no order.
  Key* kept(int64_t t, int64_t& count) {
    if (n_[t] > k_) keep(t);
    count = n_[t];
    return keys_ + t * capacity_;
  }
  // The same, best first.
  const Key* best(int64_t t, int64_t& count) {
    Key* keys = kept(t, count);
    std::sort(keys, keys + count, std::greater<Key>());
    return keys;
  }

 private:
  // The next number below, or lower: near 0 where denormal numbers may count as 0. NaN: everything else is below.
  static F below(F score) {
    constexpr F tiny = std::numeric_limits<F>::min();
    if (!(score == score)) return kInf<F>;
    if (score == -kInf<F>) return score;
    if (score <= 2 * tiny && score >= -tiny) return -2 * tiny;
    return score_of<F>(rank_of<F>(score) - 1);
  }

  void keep(int64_t t) {
    Key* keys = keys_ + t * capacity_;
    std::nth_element(keys, keys + k_ - 1, keys + n_[t], std::greater<Key>());
    n_[t] = k_;
    limit_[t] = keys[k_ - 1];
    const F score = C::score(limit_[t]);
    strict_[t] = score == score ? score : kInf<F>;
    loose_[t] = below(score);
    at_[t] = typename C::Index(C::index(limit_[t]));
    const F own = at_[t] < first_ ? strict_[t] : loose_[t];
    now_[t] = own > now_[t] ? own : now_[t];
    if (shared_ == nullptr) return;
    const Rank<F> rank = Rank<F>(limit_[t] >> C::kBits);
    Rank<F> known = shared_[t].load(std::memory_order_relaxed);
    while (known < rank && !shared_[t].compare_exchange_weak(known, rank, std::memory_order_relaxed)) {
    }
  }

  int64_t k_, capacity_, tokens_;
  Key *keys_, *limit_;
  int64_t* n_;
  F *strict_, *loose_, *floor_, *now_;
  typename C::Index* at_;
  typename C::Index first_ = 0;
  std::atomic<Rank<F>>* shared_ = nullptr;
};

}  // namespace mk::MK_ISA
