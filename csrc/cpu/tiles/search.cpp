// Exact search:  passes the k largest of s[t, i] = scale <q_t, k_i> + mask_i of every token to `finish`.
//
// Score tiles are as in softmax_read: lanes are tokens if there are many, else slots. A tile is compared with the
// threshold of each token while it is in L1. About k (1 + ln(N / k)) scores of a token pass, so the cost is that of the
// scores: bound by multiply-adds for many tokens, by reading the keys once for few.
//
// N is split into ranges by shapes only. The ranges of a token exchange their thresholds. Which thresholds a range sees
// depends on timing; the result does not (cpu/tiles/board.h). Ranges and blocks are visited in steps of the golden
// section: otherwise scores that ascend with the index would all pass the threshold.
//
// Without a threshold every score passes, and offering a score costs far more than comparing it. So the scores of the
// first blocks are collected before any is offered. The maxima of groups of slots among them give the first threshold:
// if k groups reach a bound, k slots do.
//
// Tokens with ranges (ranges.h) visit the blocks that one of their tile may address; a score outside of a range is
// -inf, which no threshold lets pass.
//
// Slots in frames (paged_topk_search) differ in their numbers alone: a chunk is a frame, and what a block offers is
// numbered from its page on. Queries with heads (indexer_search) differ in how a block is scored
// (cpu/tiles/head_scores.h).
#include "cpu/tiles/search.h"

#include <numeric>

#include "cpu/tiles/board.h"
#include "cpu/tiles/head_scores.h"
#include "cpu/tiles/pairs.h"
#include "cpu/tiles/ranges.h"

namespace mk::MK_ISA {
namespace {

template <class F>
struct SearchPlan {
  static constexpr int64_t kTasks = 64;            // ranges of slots are split until there are this many tasks
  static constexpr int64_t kLeastSlots = 4096;     // but no range is smaller than this
  static constexpr int64_t kMostFirst = 10;        // blocks of a first look: 240 KiB of scores with 64 tokens
  static constexpr int64_t kQueryBytes = 1 << 20;  // of a tile with heads: they are read once per block of slots

  int64_t batches, tokens, tile, tiles, chunk, ranges, range, k;
  int64_t first, group;  // of a first look: the number of blocks, and slots per group
  bool few;

  SearchPlan(const TopkSearch& p, const Frames* frames, const Heads* heads) {
    batches = p.lead.batches();
    tokens = p.lead.folded() * p.T;
    k = least(p.k, p.N + (frames != nullptr && frames->best_slots ? p.k : 0));
    few = few_tokens<F>(tokens);
    tile = few ? most(tokens, 1) : k > 1024 ? kLanes<F> : kTokenTile<F>;  // candidate buffers stay within the cache
    const int64_t query_bytes = heads == nullptr ? 0 : heads->H * p.K * int64_t(sizeof(F));
    while (!few && tile > kLanes<F> && tile * query_bytes > kQueryBytes) tile /= 2;
    tiles = div_up(tokens, tile);
    // Slots visited in order: more of them if reading memory is the bound.
    chunk = tokens <= 2 * kLanes<F> ? 4 * kSlotBlock : kSlotBlock;
    if (frames != nullptr) chunk = most(frames->S, 1);
    const int64_t tasks = most(batches * tiles, 1);
    ranges = most(1, least(div_up(kTasks, tasks), p.N / most(kLeastSlots, 16 * k)));
    range = round_up(div_up(most(p.N, 1), ranges), chunk);
    ranges = div_up(most(p.N, 1), range);
    // Larger groups let fewer slots pass that are not among the best: 1.3 k with groups of eight and 2 k groups.
    first = few ? 0 : least(div_up(least(16 * k, p.N), kSlotBlock), kMostFirst);
    group = 8;
    while (group > 1 && first * kSlotBlock / group < 5 * k / 4) group /= 2;
    if (group == 1) first = 0;
  }
};

// One tile of tokens: its packed queries, a block of scores, and the best candidates so far.
template <class F, bool wide>
struct SearchTile {
  Board<F, wide> board;
  F *q, *S, *row, *maxima;
  int32_t* which;
  typename Slots<F>::Buffers buffers;
  HeadScores<F> heads;
  Span* spans;
  std::atomic<Rank<F>>* shared = nullptr;
  int64_t first = 0, n = 0;

  SearchTile(Arena& arena, const SearchPlan<F>& s, int64_t K, const Heads* all)
      : board(arena, round_up(s.tile, kLanes<F>), s.k),
        q(arena.take<F>(all != nullptr ? 0 : round_up(s.tile, kLanes<F>) * Slots<F>::padded(K))),
        S(arena.take<F>(most(1, s.first) * kSlotBlock * round_up(s.tile, kLanes<F>))),
        row(arena.take<F>(kLanes<F> * Slots<F>::padded(K))),
        maxima(arena.take<F>(s.first * div_up(kSlotBlock, s.group) * round_up(s.tile, kLanes<F>))),
        which(arena.take<int32_t>(s.first * kSlotBlock)),
        buffers(Slots<F>::buffers(arena, kSlotBlock, K, 0)),
        heads(arena, all, s.tile, K, s.few),
        spans(arena.take<Span>(s.tile)) {}
};

// `i`: the number of the first slot of the block.
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

// i * step % n for i = 0 .. n - 1 visits every number below n, in steps of the golden section.
inline int64_t golden_step(int64_t n) {
  int64_t step = most(1, int64_t(double(n) * 0.6180339887498949));
  while (std::gcd(step, n) > 1) ++step;
  return step;
}

// The visiting order of the blocks of slots [lo, hi): the blocks of a chunk in sequence, chunks in steps of the golden
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

// The first blocks of a range, whose scores are collected before any is offered.
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
  // Bisection steps: to 1/256 of the distance between the least and the largest maximum.
  static constexpr int kSteps = 8;

  void bound() {
    constexpr int W = kLanes<F>;
    for (int64_t j = 0; j < L_; j += W) {
      const F* m = tile_.maxima + j;
      Vec<F> low = fill<F>(kInf<F>), high = fill<F>(-kInf<F>), found = high;
      for (int64_t g = 0; g < groups_; ++g) {
        const Vec<F> x = load<F>(m + g * L_);
        low = x > -kInf<F> && x < low ? x : low;  // -inf: outside of a range, or no number
        high = x > high ? x : high;
      }
      for (int step = 0; step < kSteps; ++step) {
        // Of infinite numbers: a bound that all groups reach, or none.
        const Vec<F> middle = F(0.5) * low + F(0.5) * high;
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

// The number of the slot at a position; negative if its frame holds no page.
class Numbers {
 public:
  Numbers(const Frames* frames, const Lead& lead, int64_t batch)
      : pages_(frames == nullptr ? nullptr : reinterpret_cast<const int64_t*>(frames->pages.batch(lead, batch))),
        S_(frames == nullptr ? 1 : most(frames->S, 1)) {}
  int64_t at(int64_t position) const {
    if (pages_ == nullptr) return position;
    const int64_t page = pages_[position / S_];
    return page < 0 ? -1 : page * S_ + position % S_;
  }

 private:
  const int64_t* pages_;
  int64_t S_;
};

// What an earlier search found for the tokens of a tile: the thresholds that it sets, and, once per tile, its slots.
template <class F, bool wide>
void carry(const TopkSearch& p, const Frames& frames, int64_t batch, bool offer, SearchTile<F, wide>& tile) {
  const TokenRows scores(frames.best_scores, p.lead, batch, p.T), slots(frames.best_slots, p.lead, batch, p.T);
  for (int64_t t = 0; t < tile.n; ++t) {
    const auto* score = reinterpret_cast<const F*>(scores.row(tile.first + t));
    const auto* slot = reinterpret_cast<const int64_t*>(slots.row(tile.first + t));
    Rank<F> worst = ~Rank<F>(0);
    int64_t n = 0;
    for (int64_t j = 0; j < p.k; ++j) {
      if (slot[j] < 0 || score[j] == -kInf<F>) continue;
      worst = std::min(worst, rank_of<F>(score[j])), ++n;
      if (offer) tile.board.offer(t, score[j], slot[j]);
    }
    if (n == p.k) tile.board.raise(t, score_of<F>(worst));
  }
}

// Visits the slots of [lo, hi) for one tile of one batch. Keys are prefetched while earlier ones are multiplied.
template <class F, bool wide>
void search_range(const TopkSearch& p, const SearchPlan<F>& s, const Numbers& numbers, const Heads* heads,
                  int64_t batch, int64_t lo, int64_t hi, SearchTile<F, wide>& tile) {
  const Slots<F> slots(p.keys, View{}, p.mask, p.lead, batch, p.N, p.K, 0, s.few);
  const TokenRows query(p.query, p.lead, batch, p.T);
  const int64_t L = round_up(tile.n, kLanes<F>);
  const bool pairs = !s.few && are_pairs<F>(p.query.dtype, p.keys, p.K);
  const ColumnScores<F> columns{query, slots, p.K, F(p.scale), pairs};
  const TokenRows weights(heads == nullptr ? View{} : heads->weights, p.lead, batch, p.T);
  if (heads != nullptr && s.few) {
    tile.heads.pack_rows(query, *heads, weights, tile.first, tile.n, F(p.scale));
  } else if (heads != nullptr) {
    tile.heads.pack_columns(columns, *heads, weights, tile.first, tile.n, L, tile.row);
  } else if (s.few) rows_query(query, tile.first, tile.n, p.K, F(p.scale), tile.q);
  else columns.pack(tile.first, tile.n, L, tile.row, tile.q);
  if (tile.shared != nullptr) tile.board.share(tile.shared, tile.n);
  FirstLook<F, wide> look(s, tile);
  const TileSpans spans(p.range, p.lead, batch, p.T, p.N, tile.first, tile.n, tile.spans);
  const Span visited = spans.narrow(lo, hi, s.chunk);
  for (Visit here(visited.first, visited.stop, s.chunk), next = here; here.more(); here = next) {
    next.advance();
    const int64_t end = here.first() + here.count();
    if (!spans.meet(here.first(), end)) continue;
    const int64_t number = numbers.at(here.first());
    if (number < 0) continue;
    const SlotBlock<F> block = columns.load(here.first(), here.count(), tile.buffers);
    if (block.n == 0) continue;
    if (tile.shared != nullptr) tile.board.share(tile.shared, tile.n);
    tile.board.begin(number);
    const bool whole = spans.hold(here.first(), end);
    if (s.few) {
      if (heads != nullptr) tile.heads.rows(block, tile.n, tile.S);
      else score_rows(block, p.K, tile.q, tile.n, tile.S);
      if (!whole) close_rows<F>(spans, block, here.first(), -kInf<F>, tile.S);
      offer_rows<F, wide>(tile, block, number);
    } else {
      F* S = look.open() ? look.scores() : tile.S;
      const PrefetchRows ahead{2 * kGroup, next.more() ? next.first() - here.first() : 0};
      if (heads != nullptr) tile.heads.columns(columns, block, L, S, ahead);
      else columns.scores(block, tile.q, L, S, ahead);
      if (!whole) close_columns<F>(spans, block, here.first(), L, -kInf<F>, S);
      if (look.open()) look.add(block, number);
      else offer_columns<F, wide>(tile, block, number, S);
    }
  }
  if (look.open()) look.close();
}

template <class F, bool wide>
void run(const TopkSearch& p, const Frames* frames, const Heads* heads, size_t finish_bytes, Finish<F> finish) {
  using Key = typename Candidate<F, wide>::Key;
  using Shared = std::atomic<Rank<F>>;
  const SearchPlan<F> s(p, frames, heads);
  const int64_t all = s.batches * s.tokens;
  if (all == 0) return;
  const bool merge = s.ranges > 1;

  // With one range, the task that read a tile finishes it. Otherwise the candidates of all ranges wait for a second
  // pass.
  Buffer<Key> waiting(merge ? s.ranges * all * s.k : 0);
  Buffer<int64_t> counts(merge ? s.ranges * all : 0);
  Buffer<Rank<F>> ranks(merge ? all : 0);
  static_assert(sizeof(Shared) == sizeof(Rank<F>));
  auto* shared = merge ? reinterpret_cast<Shared*>(ranks.data()) : nullptr;
  for (int64_t t = 0; merge && t < all; ++t) new (shared + t) Shared(rank_of<F>(-kInf<F>));

  // Sorts the candidates of a few tokens from `at` on, counted over all batches, and passes them to `finish`.
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
  SearchTile<F, wide>(measure, s, p.K, heads);
  finish_bytes += size_t(s.k) * (sizeof(F) + sizeof(int64_t)) + size_t(sort_room(s.k)) * sizeof(Key) + 3 * 64;
  const int64_t tiles = s.batches * s.tiles, step = golden_step(s.ranges);
  parallel(s.ranges * tiles, measure.used() + finish_bytes, [&](int64_t task, char* memory) {
    Arena arena(memory);
    const int64_t range = task / tiles * step % s.ranges, batch = task % tiles / s.tiles, lo = range * s.range;
    SearchTile<F, wide> tile(arena, s, p.K, heads);
    tile.first = task % s.tiles * s.tile, tile.n = least(s.tile, s.tokens - tile.first);
    tile.shared = merge ? shared + batch * s.tokens + tile.first : nullptr;
    tile.board.clear();
    if (frames != nullptr && frames->best_slots) carry<F, wide>(p, *frames, batch, range == 0, tile);
    if (s.k > 0) {
      search_range<F, wide>(p, s, Numbers(frames, p.lead, batch), heads, batch, lo, least(p.N, lo + s.range), tile);
    }
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

// Does a slot number need more than 32 bits?
bool many_slots(const TopkSearch& p, const Frames* frames) {
  constexpr int64_t kMost = int64_t(1) << 32;
  if (frames == nullptr) return p.N > kMost - 1;
  const int64_t S = most(frames->S, 1);
  const auto reaches = [](const void* numbers, int64_t n, int64_t most) {
    const auto* x = static_cast<const int64_t*>(numbers);
    return std::any_of(x, x + n, [most](int64_t number) { return number >= most; });
  };
  bool found = false;
  for (int64_t batch = 0; !found && batch < p.lead.batches(); ++batch) {
    found = reaches(frames->pages.batch(p.lead, batch), frames->F, kMost / S - 1);
    const TokenRows best(frames->best_slots, p.lead, batch, p.T);
    for (int64_t t = 0; best && !found && t < p.lead.folded() * p.T; ++t) found = reaches(best.row(t), p.k, kMost - 1);
  }
  return found;
}

}  // namespace

void search(const TopkSearch& p, size_t finish_bytes, Finish<float> finish, const Frames* frames, const Heads* heads) {
  if (many_slots(p, frames)) run<float, true>(p, frames, heads, finish_bytes, finish);
  else run<float, false>(p, frames, heads, finish_bytes, finish);
}
void search(const TopkSearch& p, size_t finish_bytes, Finish<double> finish, const Frames* frames, const Heads* heads) {
  run<double, true>(p, frames, heads, finish_bytes, finish);
}

}  // namespace mk::MK_ISA
