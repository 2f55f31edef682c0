// additive_read forward:  r_t = sum_i p[t, i] v_i,  p = softmax(s),  s[t, i] = sum_a u_a tanh(q_ta + k_ia) + mask_i
//
// Bound by arithmetic: the T N K hyperbolic tangents are nearly all of the work, K / lanes vector operations per score.
// Lanes run along K, whatever the number of tokens. So nothing is packed, and one layout serves a single token and a
// whole sequence. The sums over lanes are taken 16 scores at a time. A tile of tokens is combined with blocks of 96
// slots by the online softmax of cpu/tiles/online_softmax.h. The read is one product of weights and values per block,
// from L1. Nothing of size T N K is kept.
//
// Parallel over batches, tiles of tokens and ranges of slots. Their numbers depend on shapes only, and ranges merge in
// order, so the bits do not depend on the number of threads.
//
// Tokens with ranges (cpu/tiles/ranges.h): a token has scores for its own slots alone. In a border block each token
// also sums its own slots apart.
#include "params/additive_read.h"

#include "cpu/tiles/additive_scores.h"
#include "cpu/tiles/online_softmax.h"
#include "cpu/tiles/parallel.h"
#include "cpu/tiles/ranges.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t kTile = 32;         // tokens
constexpr int64_t kTasks = 64;        // ranges of slots are split until there are this many tasks
constexpr int64_t kLeastSlots = 384;  // but no range is smaller than this

template <class F>
struct Plan {
  int64_t batches, tokens, tile, tiles, ranges, range, KP, VP, size;

  explicit Plan(const AdditiveRead& p) {
    batches = p.lead.batches();
    tokens = p.lead.folded() * p.T;
    tile = most(1, least(tokens, kTile));
    tiles = div_up(tokens, tile);
    ranges = most(1, least(div_up(kTasks, most(1, batches * tiles)), p.N / kLeastSlots));
    range = round_up(div_up(most(p.N, 1), ranges), kSlotBlock);
    ranges = div_up(most(p.N, 1), range);
    KP = Slots<F>::padded(p.K), VP = Slots<F>::padded(p.V);
    size = round_up(2 * tile + tile * VP, 64 / int64_t(sizeof(F)));
  }
  Partial<F> partial(F* at) const { return {at, at + tile, at + 2 * tile}; }
};

// The working memory of a task.
template <class F>
struct Work {
  F *own, *row, *u, *q, *S;
  typename Slots<F>::Buffers buffers;

  Work(Arena& arena, const AdditiveRead& p, const Plan<F>& s)
      : own(arena.take<F>(s.size)),
        row(arena.take<F>(s.VP)),
        u(arena.take<F>(s.KP)),
        q(arena.take<F>(s.tile * s.KP)),
        S(arena.take<F>(s.tile * kSlotBlock + kLanes<F>)),
        buffers(Slots<F>::buffers(arena, kSlotBlock, p.K, p.V)) {}
};

// The n tokens from t0 on, over the slots [lo, hi).
template <class F>
void read_range(const AdditiveRead& p, const Plan<F>& s, int64_t batch, int64_t t0, int64_t n, int64_t lo, int64_t hi,
                const Work<F>& w, Partial<F> out) {
  const Slots<F> slots(p.keys, p.values, p.mask, p.lead, batch, p.N, p.K, p.V, true);
  const TokenRows query(p.query, p.lead, batch, p.T);
  padded_row<F>(p.vector.batch(p.lead, batch), p.vector.dtype, p.K, w.u);
  rows_query<F>(query, t0, n, p.K, F(1), w.q);
  for (int64_t t = 0; t < n; ++t) out.m[t] = -kInf<F>, out.l[t] = 0;
  std::memset(out.acc, 0, size_t(n * s.VP) * sizeof(F));
  Span memory[kTile];
  const TileSpans spans(p.range, p.lead, batch, p.T, p.N, t0, n, memory);
  const Span visited = spans.narrow(lo, hi, kSlotBlock);
  for (int64_t i = visited.first; i < visited.stop; i += kSlotBlock) {
    const int64_t end = least(i + kSlotBlock, hi);
    if (!spans.meet(i, end)) continue;
    const SlotBlock<F> block = slots.load(i, end - i, w.buffers);
    if (block.n == 0) continue;
    const bool whole = spans.hold(i, end);
    for (int64_t t = 0; t < n; ++t) {
      const RowSpan r = whole ? RowSpan{0, block.n} : rows_within(block, i, spans.at(t));
      additive_part<F>(block, i, r, p.K, w.q + t * s.KP, w.u, w.S + t * kSlotBlock, nullptr);
    }
    exponential_rows<F>(w.S, block.n, n, s.VP, out);
    for (int64_t t = 0; t < n && !whole; ++t) {
      const RowSpan r = rows_within(block, i, spans.at(t));
      if (r.count() <= 0) continue;
      gemm(Gemm<F>{1, s.VP, r.count(), w.S + t * kSlotBlock + r.first, kSlotBlock, 1, block.values + r.first * block.vs,
                   block.vs, out.acc + t * s.VP, s.VP, true});
    }
    if (!whole) continue;
    gemm(Gemm<F>{n, s.VP, block.n, w.S, kSlotBlock, 1, block.values, block.vs, out.acc, s.VP, true});
  }
}

template <class F>
void run(const AdditiveRead& p) {
  const Plan<F> s(p);
  if (s.batches * s.tokens == 0) return;
  const bool merge = s.ranges > 1;
  Buffer<F> waiting(merge ? s.batches * s.tiles * s.ranges * s.size : 0);
  auto finish = [&](int64_t batch, int64_t tile, const Partial<F>* parts, F* row) {
    const TokenRows read(p.read, p.lead, batch, p.T), lse(p.lse, p.lead, batch, p.T);
    const TokenRows rest(p.lse_rest, p.lead, batch, p.T);
    for (int64_t t = 0; t < least(s.tile, s.tokens - tile * s.tile); ++t) {
      const LogSumExp<F> end = merge_ranges<F>(parts, s.ranges, t, t * s.VP, 1, p.V, row);
      write_row<F>(row, p.V, read.dtype, read.row(tile * s.tile + t));
      put_end(end, lse, rest, tile * s.tile + t);
    }
  };
  Arena measure;
  Work<F>(measure, p, s);
  parallel(s.batches * s.tiles * s.ranges, measure.used(), [&](int64_t task, char* memory) {
    FlushDenormals flush;
    Arena arena(memory);
    const Work<F> w(arena, p, s);
    const int64_t range = task % s.ranges, tile = task / s.ranges % s.tiles, batch = task / s.ranges / s.tiles;
    const int64_t t0 = tile * s.tile, lo = range * s.range;
    const Partial<F> part = s.partial(merge ? waiting.data() + task * s.size : w.own);
    read_range<F>(p, s, batch, t0, least(s.tile, s.tokens - t0), lo, least(lo + s.range, p.N), w, part);
    if (!merge) finish(batch, tile, &part, w.row);
  });
  if (!merge) return;
  parallel(s.batches * s.tiles, size_t(s.VP) * sizeof(F), [&](int64_t task, char* memory) {
    FlushDenormals flush;
    Partial<F> parts[kTasks];
    for (int64_t r = 0; r < s.ranges; ++r) parts[r] = s.partial(waiting.data() + (task * s.ranges + r) * s.size);
    finish(task / s.tiles, task % s.tiles, parts, reinterpret_cast<F*>(memory));
  });
}

}  // namespace

void additive_read(const AdditiveRead& p) {
  if (p.query.dtype == DType::f64) run<double>(p);
  else run<float>(p);
}

}  // namespace mk::MK_ISA
