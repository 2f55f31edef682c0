// Exact search:  the k largest of s[t, i] = scale <q_t, k_i> + mask_i for every token, handed to `finish` token by
// token.
//
// Score tiles as in softmax_read: many tokens, lanes are tokens; few, lanes are slots. A tile is compared with the
// threshold of each token while it lies in L1. About k (1 + ln(N / k)) scores of a token pass at all, so the cost is
// that of the scores: bound by multiply-adds for many tokens, by reading the keys once for few.
//
// N is cut into ranges by shapes alone, and the ranges of a token tell each other their thresholds; which of them are
// seen depends on timing, the result does not (common/board.h). Ranges and blocks are visited in steps of the golden
// section: scores that ascend with the index would otherwise pass every threshold.
#include "common/search.h"

#include <numeric>

#include "common/board.h"
#include "common/scores.h"

namespace mk::MK_ISA {
namespace {

template <class F>
struct SearchPlan {
  static constexpr int64_t kTasks = 64;         // ranges of slots are cut until there are this many tasks
  static constexpr int64_t kLeastSlots = 4096;  // but no range is smaller

  int64_t batches, tokens, tile, tiles, chunk, ranges, range, k;
  bool few;

  explicit SearchPlan(const TopkSearch& p) {
    batches = p.lead.batches();
    tokens = p.lead.folded() * p.T;
    k = least(p.k, p.N);
    few = few_tokens<F>(tokens);
    tile = few ? most(tokens, 1) : k > 1024 ? kLanes<F> : kTokenTile<F>;  // buffers of candidates stay within the cache
    tiles = div_up(tokens, tile);
    chunk =
        few ? 4 * kSlotBlock : kSlotBlock;  // slots visited in order: more where the stream from memory is the limit
    const int64_t tasks = most(batches * tiles, 1);
    ranges = most(1, least(div_up(kTasks, tasks), p.N / most(kLeastSlots, 16 * k)));
    range = round_up(div_up(most(p.N, 1), ranges), chunk);
    ranges = div_up(most(p.N, 1), range);
  }
};

// One tile of tokens: its packed queries, a block of scores, and the best so far.
template <class F, bool wide>
struct SearchTile {
  Board<F, wide> board;
  F *q, *S, *row;
  typename Slots<F>::Buffers buffers;
  std::atomic<Rank<F>>* shared = nullptr;
  int64_t first = 0, n = 0;

  SearchTile(Arena& arena, const SearchPlan<F>& s, int64_t K)
      : board(arena, round_up(s.tile, kLanes<F>), s.k),
        q(arena.take<F>(round_up(s.tile, kLanes<F>) * Slots<F>::padded(K))),
        S(arena.take<F>(kSlotBlock * round_up(s.tile, kLanes<F>))),
        row(arena.take<F>(Slots<F>::padded(K))),
        buffers(Slots<F>::buffers(arena, kSlotBlock, K, 0)) {}
};

template <class F, bool wide>
void offer_columns(SearchTile<F, wide>& tile, const SlotBlock<F>& block, int64_t i) {
  constexpr int W = kLanes<F>;
  const int64_t L = round_up(tile.n, W);
  const F* threshold = tile.board.thresholds();
  for (int64_t j = 0; j < L; j += W) {
    const uint32_t lanes = tile.n - j >= W ? ~uint32_t(0) : (uint32_t(1) << (tile.n - j)) - 1;
    Vec<F> limit = load<F>(threshold + j);
    for (int64_t r = 0; r < block.n; ++r) {
      const F* scores = tile.S + r * L + j;
      uint32_t m = above<F>(load<F>(scores), limit) & lanes;
      if (__builtin_expect(m == 0, 1)) continue;
      for (; m != 0; m &= m - 1) {
        const int lane = std::countr_zero(m);
        tile.board.offer(j + lane, scores[lane], i + block.place(r));
      }
      limit = load<F>(threshold + j);
    }
  }
}

template <class F, bool wide>
void offer_rows(SearchTile<F, wide>& tile, const SlotBlock<F>& block, int64_t i) {
  const F* S = tile.S;
  for (int64_t t = 0; t < tile.n; ++t, S += kSlotBlock) {
    for (int64_t r = 0; r < block.n; r += kLanes<F>) {
      for (uint32_t m = above<F>(load<F>(S + r), fill<F>(tile.board.thresholds()[t])); m != 0; m &= m - 1) {
        const int64_t at = r + std::countr_zero(m);
        tile.board.offer(t, S[at], i + block.place(at));
      }
    }
  }
}

// i -> i * step % n visits every number below n, in steps of the golden section.
inline int64_t golden_step(int64_t n) {
  int64_t step = most(1, int64_t(double(n) * 0.6180339887498949));
  while (std::gcd(step, n) > 1) ++step;
  return step;
}

// Visits the slots of [lo, hi) for one tile of one batch.
template <class F, bool wide>
void search_range(const TopkSearch& p, const SearchPlan<F>& s, int64_t batch, int64_t lo, int64_t hi,
                  SearchTile<F, wide>& tile) {
  const Slots<F> slots(p.keys, View{}, p.mask, p.lead, batch, p.K, 0, s.few, 1.0);
  const TokenRows query(p.query, p.lead, batch, p.T);
  const int64_t L = round_up(tile.n, kLanes<F>);
  if (s.few) rows_query(query, tile.first, tile.n, p.K, F(p.scale), tile.q);
  else pack_query(query, tile.first, tile.n, L, p.K, F(p.scale), tile.row, tile.q);
  const int64_t chunks = div_up(hi - lo, s.chunk), step = golden_step(chunks);
  for (int64_t c = 0, chunk = 0; c < chunks; ++c, chunk = (chunk + step) % chunks) {
    if (tile.shared != nullptr) tile.board.share(tile.shared, tile.n);
    const int64_t begin = lo + chunk * s.chunk, end = least(hi, begin + s.chunk);
    for (int64_t i = begin; i < end; i += kSlotBlock) {
      const SlotBlock<F> block = slots.load(i, least(kSlotBlock, end - i), tile.buffers);
      if (block.n == 0) continue;
      tile.board.begin(i);
      if (s.few) {
        score_rows(block, p.K, tile.q, tile.n, tile.S);
        offer_rows<F, wide>(tile, block, i);
      } else {
        score_columns(block, p.K, tile.q, L, tile.S);
        offer_columns<F, wide>(tile, block, i);
      }
    }
  }
}

template <class F, bool wide>
void run(const TopkSearch& p, size_t finish_bytes, Finish<F> finish) {
  using Key = typename Candidate<F, wide>::Key;
  using Shared = std::atomic<Rank<F>>;
  const SearchPlan<F> s(p);
  const int64_t all = s.batches * s.tokens;
  if (all == 0) return;
  const bool merge = s.ranges > 1;

  // With one range a tile is finished by the task that read it; otherwise the candidates of all ranges wait for the
  // second pass.
  Buffer<Key> waiting(merge ? s.ranges * all * s.k : 0);
  Buffer<int64_t> counts(merge ? s.ranges * all : 0);
  Buffer<Rank<F>> ranks(merge ? all : 0);
  static_assert(sizeof(Shared) == sizeof(Rank<F>));
  auto* shared = merge ? reinterpret_cast<Shared*>(ranks.data()) : nullptr;
  for (int64_t t = 0; merge && t < all; ++t) new (shared + t) Shared(rank_of<F>(-kInf<F>));

  auto done = [&](int64_t batch, int64_t t, const Key* keys, int64_t n, Arena arena) {
    F* scores = arena.take<F>(s.k);
    int64_t* slots = arena.take<int64_t>(s.k);
    for (int64_t j = 0; j < n; ++j) {
      scores[j] = Candidate<F, wide>::score(keys[j]);
      slots[j] = Candidate<F, wide>::index(keys[j]);
    }
    finish(batch, t, scores, slots, n, arena);
  };
  Arena measure;
  SearchTile<F, wide>(measure, s, p.K);
  finish_bytes += size_t(s.k) * (sizeof(F) + sizeof(int64_t)) + 2 * 64;
  const int64_t tiles = s.batches * s.tiles, step = golden_step(s.ranges);
  parallel(s.ranges * tiles, measure.used() + finish_bytes, [&](int64_t task, char* memory) {
    Arena arena(memory);
    const int64_t range = task / tiles * step % s.ranges, batch = task % tiles / s.tiles, lo = range * s.range;
    SearchTile<F, wide> tile(arena, s, p.K);
    tile.first = task % s.tiles * s.tile, tile.n = least(s.tile, s.tokens - tile.first);
    tile.shared = merge ? shared + batch * s.tokens + tile.first : nullptr;
    tile.board.clear();
    if (s.k > 0) search_range<F, wide>(p, s, batch, lo, least(p.N, lo + s.range), tile);
    for (int64_t t = 0; t < tile.n; ++t) {
      int64_t n;
      if (merge) {
        const int64_t at = range * all + batch * s.tokens + tile.first + t;
        const Key* kept = tile.board.kept(t, n);
        counts.data()[at] = n;
        std::copy(kept, kept + n, waiting.data() + at * s.k);
      } else {
        const Key* best = tile.board.best(t, n);
        done(batch, tile.first + t, best, n, arena);
      }
    }
  });
  if (!merge) return;
  constexpr int64_t kTokens = 16;
  parallel(div_up(all, kTokens), size_t(s.ranges * s.k) * sizeof(Key) + 64 + finish_bytes,
           [&](int64_t task, char* memory) {
             const int64_t end = least(all, (task + 1) * kTokens);
             for (int64_t t = task * kTokens; t < end; ++t) {
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
               if (kept < count) std::nth_element(keys, keys + kept - 1, keys + count, std::greater<Key>());
               std::sort(keys, keys + kept, std::greater<Key>());
               done(t / s.tokens, t % s.tokens, keys, kept, arena);
             }
           });
}

}  // namespace

void search(const TopkSearch& p, size_t finish_bytes, Finish<float> finish) {
  if (p.N > int64_t(0xffffffff)) run<float, true>(p, finish_bytes, finish);  // an index too large for 32 bits
  else run<float, false>(p, finish_bytes, finish);
}
void search(const TopkSearch& p, size_t finish_bytes, Finish<double> finish) {
  run<double, true>(p, finish_bytes, finish);
}

}  // namespace mk::MK_ISA
