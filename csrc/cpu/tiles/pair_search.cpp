// The k largest of s[t, i n + j] = a[t, i] + b[t, j],   a[t, i] = scale <q_t[:h], c_i>,   b[t, j] = scale <q_t[h:], d_j>
//
// Both lists are searched at once, as two batches of one search (cpu/tiles/search.h): 2 n dot products of half the width
// instead of n * n. Then tokens run in parallel, and each enumerates its pairs in order: bound by the search where n is
// large, by the heap where k is.
//
// The pairs of the sorted halves (x, y counted from the best) form a matrix whose sums fall along rows and columns. A
// heap holds the best unseen pair of every row that has been opened; row x + 1 is opened when (x, 0) leaves. So about k
// pairs are looked at, all of them with (x + 1)(y + 1) <= k.
//
// Ties: pairs are ordered by (a + b exactly, as a rounded sum and what rounding lost; then slot number). In that order a
// pair comes after its neighbours to the left and above: if their exact sums are equal, so are the two scores in which
// they differ, and of equal scores the search ranks the smaller index first. The heap therefore yields the k best of all
// pairs in this order, and no slot behind the first min(k, n) of a half is among them, since k pairs come before it.
// Infinite scores and NaN, where sums say nothing of their terms, come first or are left out as they should be, but in
// no order among themselves.
#include "cpu/tiles/pair_search.h"

#include "cpu/tiles/board.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t kTokens = 16;  // of one task

// One half of one token, best first.
template <class F>
struct Half {
  const F* scores;
  const int64_t* slots;
  int64_t n;
};

// Pair y of row x.
template <class F>
struct Pair {
  Rank<F> sum;  // rounded
  F lost;       // a + b is sum + lost exactly
  int64_t slot;
  int64_t x, y;

  Pair() = default;
  Pair(const Half<F>& a, const Half<F>& b, int64_t n, int64_t x, int64_t y)
      : slot(a.slots[x] * n + b.slots[y]), x(x), y(y) {
    const F s = a.scores[x] + b.scores[y], part = s - a.scores[x];
    sum = rank_of<F>(s);
    lost = std::isfinite(s) ? (a.scores[x] - (s - part)) + (b.scores[y] - part) : F(0);
  }
  bool operator<(const Pair& other) const {
    if (sum != other.sum) return sum < other.sum;
    if (lost != other.lost) return lost < other.lost;
    return slot > other.slot;
  }
};

// The best pairs of a token, at most k, best first: done(j, score, slot). Returns how many there are. Room for k rows
// in the heap.
template <class F, class Done>
int64_t best_pairs(const Half<F>& a, const Half<F>& b, int64_t n, int64_t k, Pair<F>* heap, Done&& done) {
  if (a.n == 0 || b.n == 0) return 0;
  int64_t count = 1, found = 0;
  heap[0] = Pair<F>(a, b, n, 0, 0);
  auto sink = [&](const Pair<F>& pair) {  // from the top, which is free
    int64_t at = 0;
    for (int64_t below = 1; below < count; below = 2 * at + 1) {
      if (below + 1 < count && heap[below] < heap[below + 1]) ++below;
      if (!(pair < heap[below])) break;
      heap[at] = heap[below];
      at = below;
    }
    heap[at] = pair;
  };
  auto rise = [&](const Pair<F>& pair) {
    int64_t at = count++;
    for (; at > 0 && heap[(at - 1) / 2] < pair; at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
    heap[at] = pair;
  };
  while (found < k && count > 0) {
    const Pair<F> top = heap[0];
    const F score = score_of<F>(top.sum);
    if (score == -kInf<F>) break;  // by overflow: -inf is never chosen
    done(found++, score, top.slot);
    if (found == k) break;
    if (top.y + 1 < b.n) sink(Pair<F>(a, b, n, top.x, top.y + 1));
    else if (--count > 0) sink(Pair<F>(heap[count]));
    if (top.y == 0 && top.x + 1 < a.n) rise(Pair<F>(a, b, n, top.x + 1, 0));
  }
  return found;
}

template <class F>
void run(const TopkSearch& s, int64_t k, size_t finish_bytes, Finish<F> finish) {
  const Lead lead = without_half(s.lead);
  const int64_t tokens = lead.folded() * s.T, all = lead.batches() * tokens;
  Buffer<F> scores(2 * all * s.k);
  Buffer<int64_t> slots(2 * all * s.k), counts(2 * all);
  search(s, 0, [&](int64_t batch, int64_t t, const F* best, const int64_t* which, int64_t n, Arena) {
    const int64_t at = batch * tokens + t;
    std::copy(best, best + n, scores.data() + at * s.k);
    std::copy(which, which + n, slots.data() + at * s.k);
    counts.data()[at] = n;
  });
  auto half = [&](int64_t batch, int64_t t) {
    const int64_t at = batch * tokens + t;
    return Half<F>{scores.data() + at * s.k, slots.data() + at * s.k, counts.data()[at]};
  };
  struct Memory {
    F* scores;
    int64_t* slots;
    Pair<F>* heap;
    Memory(Arena& arena, int64_t k, int64_t rows)
        : scores(arena.take<F>(k)), slots(arena.take<int64_t>(k)), heap(arena.take<Pair<F>>(rows + 1)) {}
  };
  Arena measure;
  Memory(measure, k, s.k);
  parallel(div_up(all, kTokens), measure.used() + finish_bytes, [&](int64_t task, char* memory) {
    const int64_t end = least(all, (task + 1) * kTokens);
    for (int64_t at = task * kTokens; at < end; ++at) {
      Arena arena(memory);
      Memory m(arena, k, s.k);
      const int64_t batch = at / tokens, t = at % tokens;
      const Half<F> first = half(2 * batch, t), second = half(2 * batch + 1, t);
      const int64_t found = best_pairs(first, second, s.N, k, m.heap, [&](int64_t place, F score, int64_t slot) {
        m.scores[place] = score;
        m.slots[place] = slot;
      });
      finish(batch, t, m.scores, m.slots, found, arena);
    }
  });
}

template <class F>
void run_backward(TopkSearchBackward b, ScoreGradient<F> score_gradient) {
  Choice& c = b.choice;
  const View pairs = c.indices;
  const int64_t tokens = c.tokens(), all = c.all_tokens(), step = most(1, 4096 / most(c.k, 1));
  Buffer<int64_t> rows(all * c.k);
  c.indices.data = reinterpret_cast<char*>(rows.data());
  int64_t bytes = c.indices.row = c.k * int64_t(sizeof(int64_t));
  bytes *= c.T;
  for (int d = c.lead.rank - 1; d >= 0; bytes *= c.lead.size[d--]) c.indices.lead[d] = bytes;
  parallel(div_up(all, step), 0, [&](int64_t task, char*) {
    const int64_t end = least(all, (task + 1) * step);
    for (int64_t at = task * step; at < end; ++at) {
      const int64_t batch = at / tokens, t = at % tokens;
      const auto* pair = reinterpret_cast<const int64_t*>(TokenRows(pairs, c.lead, batch, c.T).row(t));
      auto* row = reinterpret_cast<int64_t*>(TokenRows(c.indices, c.lead, batch, c.T).row(t));
      for (int64_t j = 0; j < c.k; ++j) row[j] = pair[j] < 0 ? -1 : batch % 2 == 0 ? pair[j] / c.N : pair[j] % c.N;
    }
  });
  Buffer<F> ds(all * c.k);
  search_gradient(b, ds.data(), Sum<F>{}, 0,
                  [&](int64_t batch, int64_t t, F* d, Arena arena) { score_gradient(batch / 2, t, d, arena); });
}

}  // namespace

void search_pairs(const TopkSearch& halves, int64_t k, size_t finish_bytes, Finish<float> finish) {
  run<float>(halves, k, finish_bytes, finish);
}
void search_pairs(const TopkSearch& halves, int64_t k, size_t finish_bytes, Finish<double> finish) {
  run<double>(halves, k, finish_bytes, finish);
}

void pair_gradient(const TopkSearchBackward& halves, ScoreGradient<float> score_gradient) {
  run_backward<float>(halves, score_gradient);
}
void pair_gradient(const TopkSearchBackward& halves, ScoreGradient<double> score_gradient) {
  run_backward<double>(halves, score_gradient);
}

}  // namespace mk::MK_ISA
