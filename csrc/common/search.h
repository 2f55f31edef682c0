// Exact search:  the k largest of s[t, i] = scale <q_t, k_i> + mask_i for every token, handed to `finish` token by token.
//
// Score tiles as in softmax_read: many tokens, lanes are tokens; few, lanes are slots. A tile is compared with the threshold of
// each token while it lies in L1. About k (1 + ln(N / k)) scores of a token pass at all, so the cost is that of the scores: bound by
// multiply-adds for many tokens, by reading the keys once for few.
//
// N is cut into ranges by shapes alone, and the ranges of a token tell each other their thresholds; which of them are seen depends
// on timing, the result does not (common/board.h). Blocks are visited in steps of the golden section: scores that ascend with the
// index would otherwise pass every threshold.
#pragma once

#include <numeric>

#include "common/board.h"
#include "common/scores.h"
#include "cpu/topk_search.h"

namespace mk::MK_ISA {

template <class F>
struct SearchPlan {
  static constexpr int64_t kTasks = 64;        // ranges of slots are cut until there are this many tasks
  static constexpr int64_t kLeastSlots = 4096;  // but no range is smaller
  static constexpr int64_t kChunk = 4 * kSlotBlock;  // slots visited in order

  int64_t batches, tokens, tile, tiles, ranges, range, k;
  bool few;

  explicit SearchPlan(const TopkSearch& p) {
    batches = p.lead.batches();
    tokens = p.lead.folded() * p.T;
    k = least(p.k, p.N);
    few = few_tokens<F>(tokens);
    tile = few ? most(tokens, 1) : k > 1024 ? kLanes<F> : kTokenTile<F>;  // buffers of candidates stay within the cache
    tiles = div_up(tokens, tile);
    const int64_t tasks = most(batches * tiles, 1);
    ranges = most(1, least(div_up(kTasks, tasks), p.N / most(kLeastSlots, 16 * k)));
    range = round_up(div_up(most(p.N, 1), ranges), kChunk);
    ranges = div_up(most(p.N, 1), range);
  }
};

// Visits the slots of [lo, hi) for tokens [t0, t0 + n) of one batch.
template <class F, bool wide>
void search_range(const TopkSearch& p, const SearchPlan<F>& s, int64_t batch, int64_t t0, int64_t n, int64_t lo, int64_t hi,
                  std::atomic<Rank<F>>* shared, Board<F, wide>& board, Arena arena) {
  constexpr int W = kLanes<F>;
  const int64_t L = round_up(n, W), KP = Slots<F>::padded(p.K);
  const Slots<F> slots(p.keys, View{}, p.mask, p.lead, batch, p.K, 0, s.few, 1.0);
  const TokenRows query(p.query, p.lead, batch, p.T);
  F* q = arena.take<F>(s.few ? n * KP : p.K * L);
  F* S = arena.take<F>(s.few ? n * kSlotBlock : kSlotBlock * L);
  F* row = arena.take<F>(KP);
  const auto buffers = Slots<F>::buffers(arena, kSlotBlock, p.K, 0);
  if (s.few) rows_query(query, t0, n, p.K, F(p.scale), q);
  else pack_query(query, t0, n, L, p.K, F(p.scale), row, q);

  const int64_t chunks = div_up(hi - lo, s.kChunk);
  int64_t step = most(1, int64_t(double(chunks) * 0.6180339887498949));
  while (std::gcd(step, chunks) > 1) ++step;
  for (int64_t c = 0, chunk = 0; c < chunks; ++c, chunk = (chunk + step) % chunks) {
    if (shared != nullptr) board.share(shared, n);
    const int64_t begin = lo + chunk * s.kChunk, end = least(hi, begin + s.kChunk);
    for (int64_t i = begin; i < end; i += kSlotBlock) {
      const SlotBlock<F> block = slots.load(i, least(kSlotBlock, end - i), buffers);
      if (block.n == 0) continue;
      board.begin(i);
      const F* threshold = board.thresholds();
      if (s.few) {
        score_rows(block, p.K, q, n, S);
        for (int64_t t = 0; t < n; ++t) {
          const F* scores = S + t * kSlotBlock;
          for (int64_t r = 0; r < block.n; r += W) {
            for (uint32_t m = above<F>(load<F>(scores + r), fill<F>(threshold[t])); m != 0; m &= m - 1) {
              const int64_t at = r + std::countr_zero(m);
              board.offer(t, scores[at], i + block.place(at));
            }
          }
        }
        continue;
      }
      score_columns(block, p.K, q, L, S);
      for (int64_t j = 0; j < L; j += W) {
        const uint32_t lanes = n - j >= W ? ~uint32_t(0) : (uint32_t(1) << (n - j)) - 1;
        Vec<F> limit = load<F>(threshold + j);
        for (int64_t r = 0; r < block.n; ++r) {
          const F* scores = S + r * L + j;
          uint32_t m = above<F>(load<F>(scores), limit) & lanes;
          if (__builtin_expect(m == 0, 1)) continue;
          for (; m != 0; m &= m - 1) {
            const int lane = std::countr_zero(m);
            board.offer(j + lane, scores[lane], i + block.place(r));
          }
          limit = load<F>(threshold + j);
        }
      }
    }
  }
}

// finish(batch, token, keys, count, arena): the best of a token, best first, as Candidate<F, wide> keys.
template <class F, bool wide, class Finish>
void search(const TopkSearch& p, size_t finish_bytes, Finish&& finish) {
  using Key = typename Candidate<F, wide>::Key;
  using Shared = std::atomic<Rank<F>>;
  const SearchPlan<F> s(p);
  const int64_t all = s.batches * s.tokens;
  if (all == 0) return;
  const bool merge = s.ranges > 1;
  const int64_t lanes = round_up(s.tile, kLanes<F>);

  // With one range a tile is finished by the task that read it; otherwise the candidates of all ranges wait for the second pass.
  Buffer<Key> waiting(merge ? s.ranges * all * s.k : 0);
  Buffer<int64_t> counts(merge ? s.ranges * all : 0);
  Buffer<Rank<F>> ranks(merge ? all : 0);
  static_assert(sizeof(Shared) == sizeof(Rank<F>));
  auto* shared = merge ? reinterpret_cast<Shared*>(ranks.data()) : nullptr;
  for (int64_t t = 0; merge && t < all; ++t) new (shared + t) Shared(rank_of<F>(-kInf<F>));

  Arena measure;
  Board<F, wide>(measure, lanes, s.k);
  measure.take<F>(most(p.K * lanes, s.few ? s.tile * Slots<F>::padded(p.K) : 0));
  measure.take<F>(kSlotBlock * lanes), measure.take<F>(Slots<F>::padded(p.K));
  Slots<F>::buffers(measure, kSlotBlock, p.K, 0);
  const int64_t tiles = s.batches * s.tiles;
  parallel(s.ranges * tiles, measure.used() + finish_bytes, [&](int64_t task, char* memory) {
    Arena arena(memory);
    Board<F, wide> board(arena, lanes, s.k);
    const int64_t range = task / tiles, batch = task % tiles / s.tiles, t0 = task % s.tiles * s.tile;
    const int64_t n = least(s.tile, s.tokens - t0), lo = range * s.range;
    const int64_t first = batch * s.tokens + t0;
    board.clear();
    if (s.k > 0) {
      search_range<F, wide>(p, s, batch, t0, n, lo, least(p.N, lo + s.range), merge ? shared + first : nullptr, board, arena);
    }
    for (int64_t t = 0; t < n; ++t) {
      int64_t count;
      const Key* best = board.best(t, count);
      if (merge) {
        counts.data()[range * all + first + t] = count;
        std::copy(best, best + count, waiting.data() + (range * all + first + t) * s.k);
      } else {
        finish(batch, t0 + t, best, count, arena);
      }
    }
  });
  if (!merge) return;
  const int64_t step = 16;
  parallel(div_up(all, step), size_t(s.ranges * s.k) * sizeof(Key) + 64 + finish_bytes, [&](int64_t task, char* memory) {
    const int64_t end = least(all, (task + 1) * step);
    for (int64_t t = task * step; t < end; ++t) {
      Arena arena(memory);
      Key* keys = arena.take<Key>(s.ranges * s.k);
      int64_t count = 0;
      for (int64_t r = 0; r < s.ranges; ++r) {
        const Key* from = waiting.data() + (r * all + t) * s.k;
        const int64_t n = counts.data()[r * all + t];
        std::copy(from, from + n, keys + count);
        count += n;
      }
      const int64_t kept = least(count, s.k);
      std::partial_sort(keys, keys + kept, keys + count, std::greater<Key>());
      finish(t / s.tokens, t % s.tokens, keys, kept, arena);
    }
  });
}

// Calls body.template operator()<wide>(): is an index too large for 32 bits?
template <class F, class Body>
void with_width(const TopkSearch& p, Body&& body) {
  if (sizeof(F) == 8 || p.N > int64_t(0xffffffff)) body.template operator()<true>();
  else if constexpr (sizeof(F) == 4) body.template operator()<false>();
}

}  // namespace mk::MK_ISA
