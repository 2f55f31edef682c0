// Exact search:  the k largest of s[t, i] = scale <q_t, k_i> + mask_i for every token, handed to `finish` token by
// token.
//
// Score tiles as in softmax_read: many tokens, lanes are tokens; few, lanes are slots. A tile is compared with the
// threshold of each token while it lies in L1. About k (1 + ln(N / k)) scores of a token pass at all, so the cost is
// that of the scores: bound by multiply-adds for many tokens, by reading the keys once for few.
//
// N is cut into ranges by shapes alone, and the ranges of a token tell each other their thresholds; which of them are
// seen depends on timing, the result does not (cpu/tiles/board.h). Ranges and blocks are visited in steps of the golden
// section: scores that ascend with the index would otherwise pass every threshold.
//
// Without a threshold every score passes, and to offer one costs far more than to compare it. So the scores of the
// first blocks wait until all are there; the best of each group of slots among them give the first threshold: where k
// groups reach a bound, k slots do.
#include "cpu/tiles/search.h"

#include <numeric>

#include "cpu/tiles/board.h"
#include "cpu/tiles/pairs.h"

namespace mk::MK_ISA {
namespace {

template <class F>
struct SearchPlan {
  static constexpr int64_t kTasks = 64;         // ranges of slots are cut until there are this many tasks
  static constexpr int64_t kLeastSlots = 4096;  // but no range is smaller
  static constexpr int64_t kMostFirst = 10;     // blocks of a first look: with 64 tokens 240 KiB of scores

  int64_t batches, tokens, tile, tiles, chunk, ranges, range, k;
  int64_t first, group;  // a first look: its blocks, and how many slots make a group of it
  bool few;

  explicit SearchPlan(const TopkSearch& p) {
    batches = p.lead.batches();
    tokens = p.lead.folded() * p.T;
    k = least(p.k, p.N);
    few = few_tokens<F>(tokens);
    tile = few ? most(tokens, 1) : k > 1024 ? kLanes<F> : kTokenTile<F>;  // buffers of candidates stay within the cache
    tiles = div_up(tokens, tile);
    // Slots visited in order: more where the stream from memory is the limit.
    chunk = tokens <= 2 * kLanes<F> ? 4 * kSlotBlock : kSlotBlock;
    const int64_t tasks = most(batches * tiles, 1);
    ranges = most(1, least(div_up(kTasks, tasks), p.N / most(kLeastSlots, 16 * k)));
    range = round_up(div_up(most(p.N, 1), ranges), chunk);
    ranges = div_up(most(p.N, 1), range);
    // The larger the groups, the fewer slots pass that are not among the best: 1.3 k of them with eight and 2 k groups.
    first = few ? 0 : least(div_up(least(16 * k, p.N), kSlotBlock), kMostFirst);
    group = 8;
    while (group > 1 && first * kSlotBlock / group < 5 * k / 4) group /= 2;
    if (group == 1) first = 0;
  }
};

// One tile of tokens: its packed queries, a block of scores, and the best so far.
template <class F, bool wide>
struct SearchTile {
  Board<F, wide> board;
  F *q, *S, *row, *maxima;
  int32_t* which;
  typename Slots<F>::Buffers buffers;
  std::atomic<Rank<F>>* shared = nullptr;
  int64_t first = 0, n = 0;

  SearchTile(Arena& arena, const SearchPlan<F>& s, int64_t K)
      : board(arena, round_up(s.tile, kLanes<F>), s.k),
        q(arena.take<F>(round_up(s.tile, kLanes<F>) * Slots<F>::padded(K))),
        S(arena.take<F>(most(1, s.first) * kSlotBlock * round_up(s.tile, kLanes<F>))),
        row(arena.take<F>(kLanes<F> * Slots<F>::padded(K))),
        maxima(arena.take<F>(s.first * div_up(kSlotBlock, s.group) * round_up(s.tile, kLanes<F>))),
        which(arena.take<int32_t>(s.first * kSlotBlock)),
        buffers(Slots<F>::buffers(arena, kSlotBlock, K, 0)) {}
};

template <class F, bool wide>
void offer_columns(SearchTile<F, wide>& tile, const SlotBlock<F>& block, int64_t i, const F* S) {
  constexpr int W = kLanes<F>;
  const int64_t L = round_up(tile.n, W);
  const F* threshold = tile.board.thresholds();
  for (int64_t j = 0; j < L; j += W) {
    const uint32_t lanes = tile.n - j >= W ? ~uint32_t(0) : (uint32_t(1) << (tile.n - j)) - 1;
    Vec<F> limit = load<F>(threshold + j);
    for (int64_t r = 0; r < block.n; ++r) {
      const F* scores = S + r * L + j;
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

// The blocks of slots [lo, hi) in the order of visit: those of a chunk one after the other, chunks in steps of the golden
// section.
class Visit {
 public:
  Visit(int64_t lo, int64_t hi, int64_t chunk)
      : lo_(lo), hi_(hi), size_(chunk), chunks_(div_up(hi - lo, chunk)), step_(golden_step(chunks_)), left_(chunks_) {
    enter(0);
  }
  bool more() const { return left_ > 0; }
  int64_t first() const { return at_; }
  int64_t count() const { return more() ? least(kSlotBlock, end_ - at_) : 0; }
  void advance() {
    at_ += kSlotBlock;
    if (at_ < end_) return;
    --left_;
    enter((chunk_ + step_) % chunks_);
  }

 private:
  void enter(int64_t chunk) {
    chunk_ = chunk;
    at_ = lo_ + chunk * size_;
    end_ = least(hi_, at_ + size_);
  }
  int64_t lo_, hi_, size_, chunks_, step_, left_, chunk_, at_, end_;
};

// The first blocks of a range, whose scores wait for one another.
template <class F, bool wide>
class FirstLook {
 public:
  FirstLook(const SearchPlan<F>& s, SearchTile<F, wide>& tile)
      : s_(s), tile_(tile), L_(round_up(tile.n, kLanes<F>)), open_(s.first > 0 && !tile.board.bounded(tile.n)) {}
  bool open() const { return open_; }
  F* scores() const { return tile_.S + count_ * kSlotBlock * L_; }

  void add(const SlotBlock<F>& block, int64_t first) {
    constexpr int W = kLanes<F>;
    const F* S = scores();
    for (int64_t r = 0; r < block.n; r += s_.group, ++groups_) {
      for (int64_t j = 0; j < L_; j += W) {
        Vec<F> best = fill<F>(-kInf<F>);
        for (int64_t i = r; i < least(block.n, r + s_.group); ++i) {
          const Vec<F> s = load<F>(S + i * L_ + j);
          best = s > best ? s : best;
        }
        store<F>(tile_.maxima + groups_ * L_ + j, best);
      }
    }
    Waiting& w = waiting_[count_];
    w.block = block, w.first = first;
    if (block.which != nullptr) {
      w.block.which = tile_.which + count_ * kSlotBlock;
      std::copy_n(block.which, block.n, tile_.which + count_ * kSlotBlock);
    }
    if (++count_ == s_.first) close();
  }

  void close() {
    open_ = false;
    if (groups_ >= s_.k) bound();
    for (int64_t b = 0; b < count_; ++b) {
      tile_.board.begin(waiting_[b].first);
      offer_columns<F, wide>(tile_, waiting_[b].block, waiting_[b].first, tile_.S + b * kSlotBlock * L_);
    }
  }

 private:
  static constexpr int kSteps = 8;  // of bisection: to 1/256 between the least and the best of the groups

  void bound() {
    constexpr int W = kLanes<F>;
    for (int64_t j = 0; j < L_; j += W) {
      const F* m = tile_.maxima + j;
      Vec<F> low = load<F>(m), high = low, found = fill<F>(-kInf<F>);
      for (int64_t g = 1; g < groups_; ++g) {
        const Vec<F> x = load<F>(m + g * L_);
        low = x < low ? x : low, high = x > high ? x : high;
      }
      for (int step = 0; step < kSteps; ++step) {
        const Vec<F> middle = F(0.5) * low + F(0.5) * high;  // of infinite numbers: what all reach, or none
        Vec<F> reach = fill<F>(0);
        for (int64_t g = 0; g < groups_; ++g) reach += load<F>(m + g * L_) >= middle ? fill<F>(1) : fill<F>(0);
        const auto enough = reach >= fill<F>(F(s_.k));
        found = enough ? middle : found;
        low = enough ? middle : low, high = enough ? high : middle;
      }
      F bounds[W];
      store<F>(bounds, found);
      for (int64_t t = j; t < least(tile_.n, j + W); ++t) tile_.board.raise(t, bounds[t - j]);
    }
  }

  struct Waiting {
    SlotBlock<F> block;
    int64_t first;
  };
  const SearchPlan<F>& s_;
  SearchTile<F, wide>& tile_;
  const int64_t L_;
  Waiting waiting_[SearchPlan<F>::kMostFirst];
  int64_t count_ = 0, groups_ = 0;
  bool open_;
};

// Visits the slots of [lo, hi) for one tile of one batch. Keys are asked for while those before them are multiplied.
template <class F, bool wide>
void search_range(const TopkSearch& p, const SearchPlan<F>& s, int64_t batch, int64_t lo, int64_t hi,
                  SearchTile<F, wide>& tile) {
  const Slots<F> slots(p.keys, View{}, p.mask, p.lead, batch, p.N, p.K, 0, s.few);
  const TokenRows query(p.query, p.lead, batch, p.T);
  const int64_t L = round_up(tile.n, kLanes<F>);
  const bool pairs = !s.few && are_pairs<F>(p.query.dtype, p.keys, p.K);
  const ColumnScores<F> columns{query, slots, p.K, F(p.scale), pairs};
  if (s.few) rows_query(query, tile.first, tile.n, p.K, F(p.scale), tile.q);
  else columns.pack(tile.first, tile.n, L, tile.row, tile.q);
  if (tile.shared != nullptr) tile.board.share(tile.shared, tile.n);
  FirstLook<F, wide> look(s, tile);
  for (Visit here(lo, hi, s.chunk), next = here; here.more(); here = next) {
    next.advance();
    const SlotBlock<F> block = columns.load(here.first(), here.count(), tile.buffers);
    if (block.n == 0) continue;
    if (tile.shared != nullptr) tile.board.share(tile.shared, tile.n);
    tile.board.begin(here.first());
    if (s.few) {
      score_rows(block, p.K, tile.q, tile.n, tile.S);
      offer_rows<F, wide>(tile, block, here.first());
    } else {
      F* S = look.open() ? look.scores() : tile.S;
      columns.scores(block, tile.q, L, S, {2 * kGroup, next.more() ? next.first() - here.first() : 0});
      if (look.open()) look.add(block, here.first());
      else offer_columns<F, wide>(tile, block, here.first(), S);
    }
  }
  if (look.open()) look.close();
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

  // A few tokens from `at` on, of all batches: their candidates become sorted results.
  auto done = [&](int64_t at, Key* const* rows, const int64_t* n, int64_t count, Arena arena) {
    sort_rows(rows, n, count, s.k, arena.take<Key>(sort_room(s.k)));
    F* scores = arena.take<F>(s.k);
    int64_t* slots = arena.take<int64_t>(s.k);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = 0; j < n[r]; ++j) {
        scores[j] = Candidate<F, wide>::score(rows[r][j]);
        slots[j] = Candidate<F, wide>::index(rows[r][j]);
      }
      finish((at + r) / s.tokens, (at + r) % s.tokens, scores, slots, n[r], arena);
    }
  };
  Arena measure;
  SearchTile<F, wide>(measure, s, p.K);
  finish_bytes += size_t(s.k) * (sizeof(F) + sizeof(int64_t)) + size_t(sort_room(s.k)) * sizeof(Key) + 3 * 64;
  const int64_t tiles = s.batches * s.tiles, step = golden_step(s.ranges);
  parallel(s.ranges * tiles, measure.used() + finish_bytes, [&](int64_t task, char* memory) {
    Arena arena(memory);
    const int64_t range = task / tiles * step % s.ranges, batch = task % tiles / s.tiles, lo = range * s.range;
    SearchTile<F, wide> tile(arena, s, p.K);
    tile.first = task % s.tiles * s.tile, tile.n = least(s.tile, s.tokens - tile.first);
    tile.shared = merge ? shared + batch * s.tokens + tile.first : nullptr;
    tile.board.clear();
    if (s.k > 0) search_range<F, wide>(p, s, batch, lo, least(p.N, lo + s.range), tile);
    for (int64_t t = 0; t < tile.n; t += kSortRows) {
      const int64_t count = least(kSortRows, tile.n - t), at = batch * s.tokens + tile.first + t;
      Key* rows[kSortRows];
      int64_t n[kSortRows];
      for (int64_t r = 0; r < count; ++r) rows[r] = tile.board.kept(t + r, n[r]);
      if (!merge) done(at, rows, n, count, arena);
      for (int64_t r = 0; merge && r < count; ++r) {
        counts.data()[range * all + at + r] = n[r];
        std::copy(rows[r], rows[r] + n[r], waiting.data() + (range * all + at + r) * s.k);
      }
    }
  });
  if (!merge) return;
  const size_t bytes = size_t((s.ranges + kSortRows) * s.k) * sizeof(Key) + 2 * 64;
  parallel(div_up(all, kSortRows), bytes + finish_bytes, [&](int64_t task, char* memory) {
    Arena arena(memory);
    Key* keys = arena.take<Key>(s.ranges * s.k);
    Key* best = arena.take<Key>(kSortRows * s.k);
    const int64_t at = task * kSortRows, tokens = least(kSortRows, all - at);
    Key* rows[kSortRows];
    int64_t n[kSortRows];
    for (int64_t i = 0; i < tokens; ++i) {
      int64_t count = 0;
      for (int64_t r = 0; r < s.ranges; ++r) {
        const Key* from = waiting.data() + (r * all + at + i) * s.k;
        count = std::copy_n(from, counts.data()[r * all + at + i], keys + count) - keys;
      }
      n[i] = count > s.k ? keep_best(keys, count, s.k, s.k) : count;
      rows[i] = best + i * s.k;
      std::copy_n(keys, n[i], rows[i]);
    }
    done(at, rows, n, tokens, arena);
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
