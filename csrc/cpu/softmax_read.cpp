// softmax_read forward:  r_t = sum_i p[t, i] v_i,  p = softmax(s),  s[t, i] = scale <q_t, k_i> + mask_i
//
// Blocks of slots pass a tile of tokens with a running maximum m, sum l and accumulator (online softmax). The scale is
// folded into the packed queries.
//
// Many tokens (`columns`): lanes are tokens. Panels of 64 tokens are packed once, [K][lanes]. Then the scores
// S[slot][lane], the maximum, the sum and the read [V][lane] need no shuffles, and keys and values are broadcast from
// where they lie: both products are gemm() on unpacked memory, or gemm_pairs() of bfloat16 where that is faster. A
// block of 96 slots keeps S in L1. Every key and value that comes from memory is used for up to 256 tokens: bound by
// multiply-adds. Packing keys and values in strips for the product made it 8% faster and cost 9%
// (K = V = 128, N = 4096), so they are not packed.
//
// Few tokens (`rows`): lanes are slots for the scores (dot products, summed 16 rows at a time) and value columns for
// the read. Every key and value is read once: bound by bandwidth.
//
// One or two tokens, rows of 16 or 8 bits (`stored_rows`): rows are converted in registers, once per token, and the
// result is not stored.
//
// In all forms N is split into ranges, whose number depends on shapes only. (m, l, acc) of the ranges merge in order,
// so the bits do not depend on the number of threads.
//
// Tokens with ranges (cpu/tiles/ranges.h): a tile visits the blocks that one of its tokens may address, and a panel the
// rows of them. Causal reads cost half, a window of w slots costs w and a panel per token.
#include "params/softmax_read.h"

#include "cpu/tiles/border_values.h"
#include "cpu/tiles/gather.h"
#include "cpu/tiles/online_softmax.h"
#include "cpu/tiles/pairs.h"
#include "cpu/tiles/parallel.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t kTasks = 64;         // ranges of slots are split until there are this many tasks
constexpr int64_t kLeastSlots = 1024;  // but no range is smaller than this

// Tokens are taken in panels of one tile of scores. A task takes up to so many panels if there are enough tasks: a
// block of slots is then loaded from memory once for all its panels, and from L2 for each.
constexpr int64_t kPanels = 4;
constexpr int64_t kLeastTasks = 8;
constexpr int64_t kWidened = 32;

struct Plan {
  int64_t batches, tokens, tile, tiles, ranges, range;
};

template <class F>
Plan plan(const SoftmaxRead& p) {
  Plan s;
  s.batches = p.lead.batches();
  s.tokens = p.lead.folded() * p.T;
  if (few_tokens<F>(s.tokens)) {
    s.tile = most(s.tokens, 1);
  } else {
    const int64_t splits = most(1, p.N / kLeastSlots);
    s.tile = kTokenTile<F>;
    while (s.tile < kPanels * kTokenTile<F> && s.batches * div_up(s.tokens, 2 * s.tile) * splits >= kLeastTasks)
      s.tile *= 2;
  }
  s.tiles = div_up(s.tokens, s.tile);
  const int64_t tasks = most(s.batches * s.tiles, 1);
  s.ranges = most(1, least(div_up(kTasks, tasks), p.N / kLeastSlots));
  s.range = round_up(div_up(most(p.N, 1), s.ranges), kSlotBlock);
  s.ranges = div_up(most(p.N, 1), s.range);
  return s;
}

// The softmax of one block for R registers of tokens, in place. S becomes exp(S - m); for pairs, two slots in one row.
// acc, [V][L], is rescaled when m changes. Maxima and sums are dependency chains along the slots: R registers at once
// hide their latency.
template <class F, int R, Of E>
void exponentials(F* S, int64_t slots, int64_t L, F* ms, F* ls, F* acc, int64_t V) {
  constexpr int W = kLanes<F>;
  Vec<F> top[R], base[R], l[R];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) top[i] = load<F>(S + i * W);
  for (int64_t r = 1; r < slots; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) top[i] = max<F>(load<F>(S + r * L + i * W), top[i]);
  }
  for (int i = 0; i < R; ++i) {
    const int64_t j = i * W;
    Vec<F> m = load<F>(ms + j);
    if (any<F>(top[i] > m + F(kSlack))) {
      const Vec<F> moved = max<F>(top[i], m);
      // Where m is -inf nothing has been summed yet. The factor is 0, since -inf - -inf is NaN.
      const Vec<F> factor = m == -kInf<F> ? fill<F>(0) : exp<F>(m - moved);
      store<F>(ls + j, load<F>(ls + j) * factor);
      for (int64_t v = 0; v < V; ++v) store<F>(acc + v * L + j, load<F>(acc + v * L + j) * factor);
      m = moved;
      store<F>(ms + j, m);
    }
    base[i] = m == -kInf<F> ? fill<F>(0) : m;
    l[i] = fill<F>(0);
  }
  int64_t r = 0;
  if constexpr (E == Of::pairs) {
    for (; r < slots; r += 2) {
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const F* s = S + r * L + i * W;
        const Vec<F> a = exp<F>(load<F>(s) - base[i]);
        const Vec<F> b = r + 1 < slots ? exp<F>(load<F>(s + L) - base[i]) : fill<F>(0);
        l[i] += a;
        l[i] += b;
        store<F>(S + r / 2 * L + i * W, pairs_of(a, b));
      }
    }
  }
  for (; r < slots; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      F* s = S + r * L + i * W;
      const Vec<F> e = exp<F>(load<F>(s) - base[i]);
      l[i] += e;
      store<F>(s, e);
    }
  }
  for (int i = 0; i < R; ++i) store<F>(ls + i * W, load<F>(ls + i * W) + l[i]);
}

// The same for a panel of L tokens.
template <class F, Of E>
void exponentials(F* S, int64_t slots, int64_t L, F* ms, F* ls, F* acc, int64_t V) {
  constexpr int W = kLanes<F>, R = kTokenTile<F> / W < 4 ? kTokenTile<F> / W : 4;
  int64_t j = 0;
  for (; j + R * W <= L; j += R * W) exponentials<F, R, E>(S + j, slots, L, ms + j, ls + j, acc + j, V);
  for (; j < L; j += W) exponentials<F, 1, E>(S + j, slots, L, ms + j, ls + j, acc + j, V);
}

template <class F>
void columns(const SoftmaxRead& p, const Slots<F>& slots, int64_t batch, const TokenRows& query, bool pairs, int64_t t0,
             int64_t n, int64_t lo, int64_t hi, Partial<F> out, Arena arena) {
  constexpr int64_t panel = kTokenTile<F>;
  const int64_t lanes = round_up(n, kLanes<F>);
  Span memory[kPanels * panel];
  const TileSpans spans(p.range, p.lead, batch, p.T, p.N, t0, n, memory);
  BorderValues<F> border(arena, slots, p.V, pairs, bool(p.range));
  const ColumnScores<F> scores{query, slots, p.K, F(p.scale), pairs};
  F* q = arena.take<F>(p.K * lanes);
  F* S = arena.take<F>(kSlotBlock * least(lanes, panel));
  F* row = arena.take<F>(kLanes<F> * p.K);
  const auto buffers = Slots<F>::buffers(arena, kSlotBlock, p.K, p.V);
  for (int64_t x = 0; x < lanes; x += panel) {
    scores.pack(t0 + x, least(panel, n - x), least(panel, lanes - x), row, q + x * p.K);
  }
  for (int64_t j = 0; j < lanes; ++j) out.m[j] = -kInf<F>, out.l[j] = 0;
  std::memset(out.acc, 0, size_t(p.V * lanes) * sizeof(F));

  // The first product over the keys prefetches them. Values of the next block are prefetched between products.
  const int64_t groups = div_up(lanes, panel) * (div_up(kSlotBlock, kGroup) + div_up(p.V, kGroup));
  const int64_t lines = div_up(kSlotBlock * slots.value_lines(), groups);
  const Span visited = spans.narrow(lo, hi, kSlotBlock);
  for (int64_t i = visited.first; i < visited.stop; i += kSlotBlock) {
    if (!spans.meet(i, least(i + kSlotBlock, hi))) continue;
    const SlotBlock<F> block = scores.load(i, least(kSlotBlock, hi - i), buffers);
    if (block.n == 0) continue;
    bool looked = false;
    if constexpr (kHasPairs<F>) {
      const auto value = [&](int64_t j) { return slots.stored_values().row(i + block.place(j)); };
      if (pairs) pair_rows(block.n, p.V, p.V, buffers.values, value);
    }
    typename Slots<F>::Prefetch values(slots, least(i + kSlotBlock, hi), least(i + 2 * kSlotBlock, hi));
    const auto prefetch = [&] { values.next(lines); };
    for (int64_t x = 0; x < lanes; x += panel) {
      const int64_t L = least(panel, lanes - x);
      F *acc = out.acc + x * p.V, *m = out.m + x, *l = out.l + x;
      const TileSpans own(spans, x, least(panel, n - x));
      RowSpan r{0, block.n};
      if (own.given()) r = rows_within(block, i, own.within(i, least(i + kSlotBlock, hi)));
      if (pairs) r.first = r.first / 2 * 2;
      if (r.count() <= 0) continue;
      const BlockPart<F> part(block, i, r);
      scores.scores(part.block, q + x * p.K, L, S, {x == 0 ? 2 * kGroup : 0}, prefetch);
      if (!own.hold(part.begin(), part.end())) {
        close_columns<F>(own, part.block, part.first, L, -kInf<F>, S);
        if (!looked) border.look(block, i, buffers.values);
        looked = true;
      }
      if constexpr (kHasPairs<F>) {
        if (pairs) {
          exponentials<F, Of::pairs>(S, part.block.n, L, m, l, acc, p.V);
          const F* value = buffers.values + r.first / 2 * p.V;
          for (int64_t v = 0; v < p.V; v += kGroup, prefetch()) {
            gemm_pairs(
                {least(kGroup, p.V - v), L, div_up(part.block.n, 2), value + v, 1, p.V, S, L, acc + v * L, L, true}, 1);
          }
          if (looked && border.odd()) border.add(own, r, L, S, acc);
          continue;
        }
      }
      exponentials<F, Of::numbers>(S, part.block.n, L, m, l, acc, p.V);
      const bool apart = looked && border.odd();
      const F* value = apart ? border.clean() + r.first * p.V : part.block.values;
      const int64_t stride = apart ? p.V : block.vs;
      for (int64_t v = 0; v < p.V; v += kGroup, prefetch()) {
        gemm(Gemm<F>{least(kGroup, p.V - v), L, part.block.n, value + v, 1, stride, S, L, acc + v * L, L, true});
      }
      if (apart) border.add(own, r, L, S, acc);
    }
  }
}

// Queries packed as rows, and empty results.
template <class F>
F* begin_rows(const SoftmaxRead& p, const TokenRows& query, int64_t n, const Partial<F>& out, Arena& arena) {
  F* q = arena.take<F>(n * Slots<F>::padded(p.K));
  rows_query(query, 0, n, p.K, F(p.scale), q);
  for (int64_t t = 0; t < n; ++t) out.m[t] = -kInf<F>, out.l[t] = 0;
  std::memset(out.acc, 0, size_t(n * Slots<F>::padded(p.V)) * sizeof(F));
  return q;
}

template <class F>
void rows(const SoftmaxRead& p, const Slots<F>& slots, const TileSpans& spans, const TokenRows& query, int64_t n,
          int64_t lo, int64_t hi, Partial<F> out, Arena arena) {
  const int64_t VP = Slots<F>::padded(p.V);
  const F* q = begin_rows(p, query, n, out, arena);
  F* S = arena.take<F>(n * kSlotBlock);
  const auto buffers = Slots<F>::buffers(arena, kSlotBlock, p.K, p.V);

  // Converted rows pass through a buffer: blocks are short, so that it stays in L1 until it is read.
  const int64_t step = p.keys.dtype == kOwn<F> && p.values.dtype == kOwn<F> ? kSlotBlock : kWidened;
  const Span visited = spans.narrow(lo, hi, step);
  for (int64_t i = visited.first; i < visited.stop; i += step) {
    const int64_t end = least(i + step, hi);
    if (!spans.meet(i, end)) continue;
    const SlotBlock<F> block = slots.load(i, end - i, buffers);
    if (block.n == 0) continue;
    score_rows(block, p.K, q, n, S);
    const bool whole = spans.hold(i, end);
    if (!whole) close_rows<F>(spans, block, i, -kInf<F>, S);
    exponential_rows<F>(S, block.n, n, VP, out);
    for (int64_t t = 0; t < n && !whole; ++t) {
      const RowSpan r = rows_within(block, i, spans.at(t));
      if (r.count() <= 0) continue;
      gemm({1, VP, r.count(), S + t * kSlotBlock + r.first, kSlotBlock, 1, block.values + r.first * block.vs, block.vs,
            out.acc + t * VP, VP, true});
    }
    if (!whole) continue;
    gemm({n, VP, block.n, S, kSlotBlock, 1, block.values, block.vs, out.acc, VP, true, 0, block.values_ahead});
  }
}

// Are rows converted in registers, again for every token? For one or two tokens this is less work than a pass through a
// buffer. K=V=128 T=1, one core: N=2^14 int8 46 -> 20 ns per slot, bfloat16 35 -> 22; N=2^19 int8 59 -> 35, bfloat16
// 75 -> 54. Rows that need no conversion gain nothing.
template <class F>
bool as_stored(const SoftmaxRead& p, int64_t tokens) {
  constexpr int64_t kTokens = 2;
  return tokens <= kTokens && p.keys.dtype != kOwn<F> && (!p.values || p.values.dtype != kOwn<F>);
}

// Few tokens, rows in their stored dtype. The scales of rows multiply the scores and the weights.
template <class F>
void stored_rows(const SoftmaxRead& p, const Slots<F>& slots, const TileSpans& spans, const TokenRows& query, int64_t n,
                 int64_t lo, int64_t hi, Partial<F> out, Arena arena) {
  constexpr int W = kLanes<F>;
  const int64_t KP = Slots<F>::padded(p.K), VP = Slots<F>::padded(p.V);
  const F* q = begin_rows(p, query, n, out, arena);
  F* S = arena.take<F>(kSlotBlock);
  F* sum = arena.take<F>(VP);
  RowList<F> keys = RowList<F>::take(arena, kSlotBlock), values = RowList<F>::take(arena, kSlotBlock);
  const auto buffers = Slots<F>::buffers(arena, kSlotBlock, 0, 0);
  const auto &key = slots.stored_keys(), &value = slots.stored_values();

  const Span visited = spans.narrow(lo, hi, kSlotBlock);
  for (int64_t i = visited.first; i < visited.stop; i += kSlotBlock) {
    if (!spans.meet(i, least(i + kSlotBlock, hi))) continue;
    const SlotBlock<F> block = slots.list(i, least(kSlotBlock, hi - i), buffers);
    if (block.n == 0) continue;
    for (int64_t j = 0; j < block.n + kAhead; ++j) {
      const int64_t slot = j < block.n ? i + block.place(j) : least(i + kSlotBlock + j - block.n, hi - 1);
      keys.rows[j] = key.row(slot), values.rows[j] = value.row(slot);
    }
    for (int64_t t = 0; t < n; ++t) {
      const RowSpan r = spans.given() ? rows_within(block, i, spans.at(t)) : RowSpan{0, block.n};
      const int64_t count = r.count();
      if (count <= 0) continue;
      row_products(key.dtype, keys.rows + r.first, count, p.K, q + t * KP, S);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t slot = i + block.place(r.first + j);
        S[j] = S[j] * key.scale.template at<F>(slot) + (block.mask == nullptr ? F(0) : block.mask[r.first + j]);
      }
      for (int64_t j = count; j < round_up(count, W); ++j) S[j] = -kInf<F>;
      F* acc = out.acc + t * VP;
      exponential_rows<F>(S, count, 1, VP, {out.m + t, out.l + t, acc});
      if (p.V == 0) continue;
      for (int64_t j = 0; j < count; ++j) S[j] *= value.scale.template at<F>(i + block.place(r.first + j));
      weighted_sum(value.dtype, values.rows + r.first, S, count, p.V, sum);
      for (int64_t c = 0; c < VP; c += W) store<F>(acc + c, load<F>(acc + c) + load<F>(sum + c));
    }
  }
}

template <class F>
void run(const SoftmaxRead& p) {
  const Plan s = plan<F>(p);
  if (s.batches * s.tokens == 0) return;
  const bool few = few_tokens<F>(s.tokens);
  const bool pairs = are_pairs<F>(p.query.dtype, p.keys, p.K) && p.values.dtype == DType::bf16 && p.V > 0;
  const int64_t VP = Slots<F>::padded(p.V);
  const int64_t lanes = few ? s.tile : round_up(s.tile, kLanes<F>);
  const int64_t size = round_up(2 * lanes + (few ? s.tile * VP : p.V * lanes), 64 / int64_t(sizeof(F)));
  auto partial = [&](F* at) { return Partial<F>{at, at + lanes, at + 2 * lanes}; };

  // With one range, the task that read a tile finishes it. Otherwise partial results wait for a second pass.
  const bool merge = s.ranges > 1;
  Buffer<F> waiting(merge ? s.batches * s.tiles * s.ranges * size : 0);
  Arena measure;
  Slots<F>::buffers(measure, kSlotBlock, p.K, p.V);
  measure.take<F>((Slots<F>::padded(p.K) + kSlotBlock) * lanes + kLanes<F> * (p.K + p.V) + size + VP + kSlotBlock);
  for (int i = 0; i < 2; ++i) RowList<F>::take(measure, kSlotBlock);
  if (p.range) measure.take<F>((kSlotBlock + 1) * p.V + 32);
  const size_t scratch = measure.used() + 8 * 64;

  // `row` has room for the reads of one register of tokens.
  auto finish_tile = [&](int64_t batch, int64_t tile, const Partial<F>* parts, F* row) {
    constexpr int64_t W = kLanes<F>;
    const int64_t t0 = tile * s.tile, n = least(s.tile, s.tokens - t0), together = few ? 1 : W;
    const int64_t lanes = round_up(n, W);
    const TokenRows read(p.read, p.lead, batch, p.T), lse(p.lse, p.lead, batch, p.T);
    const TokenRows rest(p.lse_rest, p.lead, batch, p.T);
    LogSumExp<F> ends[W];
    for (int64_t t = 0; t < n; t += together) {
      if (few) {
        ends[0] = merge_ranges<F>(parts, s.ranges, t, t * VP, 1, p.V, row);
      } else {
        const int64_t panel = t / kTokenTile<F> * kTokenTile<F>, L = least(kTokenTile<F>, lanes - panel);
        merge_lanes<F>(parts, s.ranges, t, panel * p.V + t - panel, L, p.V, row, ends);
      }
      for (int64_t i = 0; i < least(together, n - t); ++i) {
        if (read) write_row<F>(row + i * p.V, p.V, read.dtype, read.row(t0 + t + i));
        put_end(ends[i], lse, rest, t0 + t + i);
      }
    }
  };

  parallel(s.batches * s.tiles * s.ranges, scratch, [&](int64_t task, char* memory) {
    FlushDenormals flush;
    Arena arena(memory);
    const int64_t range = task % s.ranges, tile = task / s.ranges % s.tiles, batch = task / s.ranges / s.tiles;
    const Slots<F> slots(p.keys, p.values, p.mask, p.lead, batch, p.N, p.K, p.V, few);
    const TokenRows query(p.query, p.lead, batch, p.T);
    const int64_t lo = range * s.range, hi = least(lo + s.range, p.N);
    const int64_t t0 = tile * s.tile, n = least(s.tile, s.tokens - t0);
    F* own = arena.take<F>(size);
    F* row = arena.take<F>(kLanes<F> * p.V);
    const Partial<F> part = partial(merge ? waiting.data() + task * size : own);
    if (few) {
      Span memory[kLanes<F>];
      const TileSpans spans(p.range, p.lead, batch, p.T, p.N, t0, n, memory);
      if (as_stored<F>(p, s.tokens)) stored_rows<F>(p, slots, spans, query, n, lo, hi, part, arena);
      else rows<F>(p, slots, spans, query, n, lo, hi, part, arena);
    } else {
      columns<F>(p, slots, batch, query, pairs, t0, n, lo, hi, part, arena);
    }
    if (!merge) finish_tile(batch, tile, &part, row);
  });
  if (!merge) return;
  parallel(s.batches * s.tiles, size_t(kLanes<F> * p.V) * sizeof(F) + 64, [&](int64_t task, char* memory) {
    FlushDenormals flush;
    Partial<F> parts[kTasks];
    for (int64_t r = 0; r < s.ranges; ++r) parts[r] = partial(waiting.data() + (task * s.ranges + r) * size);
    finish_tile(task / s.tiles, task % s.tiles, parts, reinterpret_cast<F*>(memory));
  });
}

}  // namespace

void softmax_read(const SoftmaxRead& p) {
  if (p.query.dtype == DType::f64) run<double>(p);
  else run<float>(p);
}

}  // namespace mk::MK_ISA
