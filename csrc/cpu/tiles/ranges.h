// Ranges: the slots first <= i < stop that each token may address. A tile of tokens visits only the blocks that one
// of them may address. In a border block, which not all of them may address in whole, scores outside of a token's
// range become -inf, and gradients 0; odd_rows.h has what numbers that are not finite need beside.
#pragma once

#include <algorithm>

#include "cpu/tiles/scores.h"

namespace mk::MK_ISA {

struct Span {
  int64_t first = 0, stop = 0;

  bool meets(int64_t a, int64_t b) const { return first < b && a < stop; }
  bool holds(int64_t a, int64_t b) const { return first <= a && b <= stop; }
};

// The spans of a tile of tokens, clipped to [0, N); an empty one is [0, 0). Without ranges, all slots are within.
class TileSpans {
 public:
  TileSpans() = default;
  // `memory`: room for n spans.
  TileSpans(const View& range, const Lead& lead, int64_t batch, int64_t T, int64_t N, int64_t t0, int64_t n,
            Span* memory) {
    if (!range) return;
    spans_ = memory, n_ = n, hull_ = {N, 0}, core_ = {0, N};
    const TokenRows rows(range, lead, batch, T);
    for (int64_t t = 0; t < n; ++t) {
      const auto* ends = reinterpret_cast<const int64_t*>(rows.row(t0 + t));
      Span s{most(ends[0], 0), least(ends[1], N)};
      if (s.first >= s.stop) s = {};
      else hull_ = {least(hull_.first, s.first), most(hull_.stop, s.stop)};
      core_ = {most(core_.first, s.first), least(core_.stop, s.stop)};
      memory[t] = s;
    }
    if (hull_.first >= hull_.stop) hull_ = {};
  }

  // The spans of tokens [t0, t0 + n) of another tile.
  TileSpans(const TileSpans& tile, int64_t t0, int64_t n) {
    if (!tile.given()) return;
    *this = tile;
    spans_ += t0, n_ = n, core_ = {0, hull_.stop};
    for (int64_t t = 0; t < n; ++t) core_ = {most(core_.first, at(t).first), least(core_.stop, at(t).stop)};
  }

  bool given() const { return spans_ != nullptr; }
  const Span& at(int64_t t) const { return spans_[t]; }
  int64_t count() const { return n_; }
  // May every token address all of [a, b)?
  bool hold(int64_t a, int64_t b) const { return !given() || core_.holds(a, b); }
  // May any token address a slot of [a, b)?
  bool meet(int64_t a, int64_t b) const {
    if (!given()) return true;
    if (!hull_.meets(a, b)) return false;
    return std::any_of(spans_, spans_ + n_, [&](const Span& s) { return s.meets(a, b); });
  }
  // [lo, hi) without the blocks of `step` slots, from lo on, before and after the slots that a token may address.
  Span narrow(int64_t lo, int64_t hi, int64_t step) const {
    if (!given()) return {lo, hi};
    const int64_t first = lo + most(0, hull_.first - lo) / step * step;
    return {first, most(first, least(hi, hull_.stop))};
  }
  // The slots of [a, b) that a token may address, and what lies between them; none: first >= stop.
  Span within(int64_t a, int64_t b) const {
    Span found{b, a};
    for (int64_t t = 0; t < n_; ++t) {
      if (!spans_[t].meets(a, b)) continue;
      found = {least(found.first, most(a, spans_[t].first)), most(found.stop, least(b, spans_[t].stop))};
    }
    return found;
  }

 private:
  const Span* spans_ = nullptr;
  int64_t n_ = 0;
  Span hull_, core_;  // the slots from the first to the last that a token may address; those that all may address
};

// The rows of a block whose slots lie in a span.
struct RowSpan {
  int64_t first, stop;
  int64_t count() const { return stop - first; }
};
template <class F>
inline RowSpan rows_within(const SlotBlock<F>& block, int64_t first, const Span& span) {
  const int64_t a = most(0, span.first - first), b = most(a, span.stop - first);
  if (block.which == nullptr) return {least(a, block.n), least(b, block.n)};
  const auto* end = block.which + block.n;
  const auto row = [&](int64_t place) { return std::lower_bound(block.which, end, place) - block.which; };
  return {row(a), row(b)};
}

// A block of slots whose first is `first`, and rows [r.first, r.stop) of it. `first` moves where rows are numbered by
// place. Rows of pairs are twice as many: see `pairs`.
template <class F>
struct BlockPart {
  SlotBlock<F> block;
  int64_t first;

  BlockPart(const SlotBlock<F>& whole, int64_t start, RowSpan r) : block(whole), first(start) {
    block.n = r.count();
    if (block.keys != nullptr) block.keys += r.first * block.ks;
    if (block.values != nullptr) block.values += r.first * block.vs;
    if (block.mask != nullptr) block.mask += r.first;
    if (block.which != nullptr) block.which += r.first;
    else first += r.first;
  }
  // The slots from the first to the last row.
  int64_t begin() const { return first + (block.n == 0 ? 0 : block.place(0)); }
  int64_t end() const { return first + (block.n == 0 ? 0 : block.place(block.n - 1) + 1); }
};

// S[slot][lane] becomes `outside` where the token of the lane may not address the slot, and in lanes beyond the tokens.
template <class F>
inline void close_columns(const TileSpans& spans, const SlotBlock<F>& block, int64_t first, int64_t L, F outside,
                          F* S) {
  constexpr int W = kLanes<F>;
  for (int64_t l = 0; l < L; l += W) {
    F lo[W], hi[W];  // counted from `first`: small numbers, which F holds exactly
    for (int64_t i = 0; i < W; ++i) {
      const Span s = l + i < spans.count() ? spans.at(l + i) : Span{};
      lo[i] = F(std::clamp<int64_t>(s.first - first, 0, kSlotBlock));
      hi[i] = F(std::clamp<int64_t>(s.stop - first, 0, kSlotBlock));
    }
    const Vec<F> from = load<F>(lo), to = load<F>(hi), none = fill<F>(outside);
    for (int64_t j = 0; j < block.n; ++j) {
      const Vec<F> i = fill<F>(F(block.place(j)));
      const Vec<F> s = load<F>(S + j * L + l);
      store<F>(S + j * L + l, i < from ? none : i < to ? s : none);
    }
  }
}

// The same for S[token][slot] in rows of kSlotBlock.
template <class F>
inline void close_rows(const TileSpans& spans, const SlotBlock<F>& block, int64_t first, F outside, F* S) {
  for (int64_t t = 0; t < spans.count(); ++t) {
    const RowSpan r = rows_within(block, first, spans.at(t));
    std::fill(S + t * kSlotBlock, S + t * kSlotBlock + r.first, outside);
    std::fill(S + t * kSlotBlock + r.stop, S + t * kSlotBlock + block.n, outside);
  }
}

}  // namespace mk::MK_ISA
