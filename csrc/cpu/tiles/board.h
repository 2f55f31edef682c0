// The best k of a stream of scores, for a tile of tokens.
//
// A candidate is one integer that encodes (score, index) in a total order: NaN first, then larger scores, then smaller
// indices. So the best k do not depend on the order in which slots are visited, nor on the thresholds that rejected
// others, as long as no threshold is too high. A token's candidates are appended to its buffer. When the buffer is
// full, at least the best k are kept, and the worst of those becomes the threshold.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <functional>

#include "cpu/tiles/parallel.h"
#include "cpu/tiles/simd.h"

namespace mk::MK_ISA {

// Scores as unsigned integers in the same order, NaN the largest; -0 and +0 are equal.
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

// 32 bits of index beside a float if they are enough, else 64.
template <class F, bool wide>
struct Candidate {
  using Index = std::conditional_t<wide, uint64_t, uint32_t>;
  using Key = std::conditional_t<wide, unsigned __int128, uint64_t>;
  static constexpr int kBits = 8 * sizeof(Index);
  static Key key(F score, int64_t index) { return Key(rank_of<F>(score)) << kBits | Index(~Index(index)); }
  static F score(Key key) { return score_of<F>(Rank<F>(key >> kBits)); }
  static int64_t index(Key key) { return int64_t(Index(~Index(key))); }
};

// The lanes whose score is above the threshold, or NaN.
template <class F>
MK_INLINE uint32_t above(Vec<F> s, Vec<F> threshold) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) return _mm512_cmp_ps_mask((__m512)s, (__m512)threshold, _CMP_NLE_UQ);
  else return _mm512_cmp_pd_mask((__m512d)s, (__m512d)threshold, _CMP_NLE_UQ);
#else
  return bits<F>(~(s <= threshold));
#endif
}

// Moves the best of n keys to the front, at least `few` and at most `many` of them, unordered; returns their number. It
// bisects on the value of the key. It compares whole registers without mispredicted branches, where std::nth_element
// branches on every key. A bound exists for every count, unless keys are equal: of pages that a caller names twice.
// Requires 1 <= few <= many < n.
template <class Key>
int64_t keep_best(Key* keys, int64_t n, int64_t few, int64_t many) {
  // More than `many` keys are >= `low`. Fewer than `few` are >= `high`, or `high` is the bound.
  Key low = keys[0], high = keys[0];
  for (int64_t i = 1; i < n; ++i) low = keys[i] < low ? keys[i] : low, high = keys[i] > high ? keys[i] : high;
  for (Key bound = few > 1 ? low + (high - low) / 2 : high;; bound = low + (high - low) / 2) {
    int64_t reach = 0;
    for (int64_t i = 0; i < n; ++i) reach += keys[i] >= bound;
    if (reach < few) high = bound;
    else if (reach > many && bound != low) low = bound;
    else if (reach > many) {
      const int64_t above = std::partition(keys, keys + n, [bound](Key key) { return key > bound; }) - keys;
      if (above < many) std::fill(keys + above, keys + many, bound);
      return many;
    } else {
      int64_t kept = 0;
      for (int64_t i = 0; i < n; ++i) {
        keys[kept] = keys[i];
        kept += keys[i] >= bound;
      }
      return kept;
    }
  }
}

// Rows of keys that are sorted together, one row per lane.
constexpr int64_t kSortRows = MK_BYTES / 8;
constexpr int64_t kSortKeys = 512;  // longer rows are sorted one by one
constexpr int64_t sort_room(int64_t n) {
  return n <= kSortKeys ? int64_t(std::bit_ceil(uint64_t(most(n, 1)))) * kSortRows : 0;
}

// Sorts `count` rows of n[r] keys each, at most `longest`, the largest first. Short rows use Batcher's odd-even merge
// sort with one row per lane, which has no branch that depends on a key. `room`: sort_room(longest) keys.
template <class Key>
void sort_rows(Key* const* rows, const int64_t* n, int64_t count, int64_t longest, [[maybe_unused]] Key* room) {
  if constexpr (sizeof(Key) == 8) {
    if (longest <= kSortKeys && count > 1) {
      typedef uint64_t Lanes __attribute__((vector_size(MK_BYTES)));
      const int64_t size = std::bit_ceil(uint64_t(most(longest, 1)));
      for (int64_t i = 0; i < size; ++i) {
        for (int64_t r = 0; r < kSortRows; ++r) room[i * kSortRows + r] = r < count && i < n[r] ? rows[r][i] : 0;
      }
      auto* lanes = reinterpret_cast<Lanes*>(room);
      for (int64_t p = 1; p < size; p *= 2) {
        for (int64_t step = p; step >= 1; step /= 2) {
          for (int64_t j = step % p; j + step < size; j += 2 * step) {
            // Skips pairs that lie in different runs of 2 p.
            for (int64_t i = j; i < least(j + step, size - step); ++i) {
              if ((i ^ (i + step)) >= 2 * p) continue;
              const Lanes a = lanes[i], b = lanes[i + step];
              lanes[i] = a > b ? a : b;
              lanes[i + step] = a > b ? b : a;
            }
          }
        }
      }
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < n[r]; ++i) rows[r][i] = room[i * kSortRows + r];
      }
      return;
    }
  }
  for (int64_t r = 0; r < count; ++r) std::sort(rows[r], rows[r] + n[r], std::greater<Key>());
}

template <class F, bool wide>
class Board {
 public:
  using C = Candidate<F, wide>;
  using Key = typename C::Key;

  // Keys per token for the best `k`, where k is at most the number of slots.
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

  // Shares thresholds between ranges: `ranks` has one rank for each of the `n` tokens, found in other slots. Candidates
  // below it are rejected.
  void share(std::atomic<Rank<F>>* ranks, int64_t n) {
    shared_ = ranks;
    for (int64_t t = 0; t < n; ++t) raise(t, score_of<F>(ranks[t].load(std::memory_order_relaxed)));
  }
  bool bounded(int64_t n) const {
    return std::all_of(floor_, floor_ + n, [](F x) { return x > -kInf<F>; });
  }
  // Token t has k slots with at least this score.
  void raise(int64_t t, F score) {
    const F other = below(score);
    if (other > floor_[t]) floor_[t] = other;
  }

  // Call it before scores of slots from `first` on. A score equal to the threshold is accepted only if its slot may
  // come before the threshold's slot.
  void begin(int64_t first) {
    first_ = typename C::Index(first);
    for (int64_t t = 0; t < tokens_; ++t) {
      const F own = at_[t] < first_ ? strict_[t] : loose_[t];
      now_[t] = own > floor_[t] ? own : floor_[t];
    }
  }
  // Only scores above them need to be offered.
  const F* thresholds() const { return now_; }

  void offer(int64_t t, F score, int64_t index) {
    const Key key = C::key(score, index);
    if (key <= limit_[t]) return;
    keys_[t * capacity_ + n_[t]++] = key;
    if (n_[t] == capacity_) keep(t, (k_ + capacity_) / 2);
  }

  // The best candidates of token t, at most k, unordered.
  Key* kept(int64_t t, int64_t& count) {
    if (n_[t] > k_) keep(t, k_);
    count = n_[t];
    return keys_ + t * capacity_;
  }

 private:
  // The next smaller number, or less near 0, where denormal numbers may count as 0. For NaN: +inf.
  static F below(F score) {
    constexpr F tiny = std::numeric_limits<F>::min();
    if (!(score == score)) return kInf<F>;
    if (score == -kInf<F>) return score;
    if (score <= 2 * tiny && score >= -tiny) return -2 * tiny;
    return score_of<F>(rank_of<F>(score) - 1);
  }

  void keep(int64_t t, int64_t many) {
    Key* keys = keys_ + t * capacity_;
    n_[t] = keep_best(keys, n_[t], k_, many);
    limit_[t] = *std::min_element(keys, keys + n_[t]);
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
