// The product of weights and values over a border block of slots, many tokens; lanes are tokens.
#pragma once

#include "cpu/tiles/odd_rows.h"

namespace mk::MK_ISA {

// The values of a block that some token may not address in whole: odd rows are looked for once, and what they add is
// added apart.
template <class F>
class BorderValues {
 public:
  BorderValues(Arena& arena, const Slots<F>& slots, int64_t V, bool pairs, bool ranges)
      : slots_(slots),
        V_(V),
        pairs_(pairs),
        clean_(arena.take<F>(ranges ? kSlotBlock * V : 0)),
        row_(arena.take<F>(ranges ? V : 0)) {}

  // Looks at a block. Of pairs, `rows` [n / 2][V] are changed in place; of numbers, clean() are rows of V.
  void look(const SlotBlock<F>& block, int64_t first, F* rows) {
    block_ = block, first_ = first;
    odd_ = OddRows::find<F>(block.n, V_, [&](int64_t j) { return value(j); });
    if constexpr (kHasPairs<F>) {
      if (pairs_) {
        for (int64_t i = 0; i < odd_.n; ++i) zero_pair(rows, V_, V_, odd_.row[i]);
        return;
      }
    }
    if (odd_.n > 0) copy_finite<F>(block.values, block.vs, block.n, V_, odd_, clean_, V_);
  }
  bool odd() const { return odd_.n > 0; }
  const F* clean() const { return clean_; }

  // acc[v][lane] += P[slot][lane] value[slot][v] of the odd rows in `r`, for the tokens that may address them. P has
  // the rows from r.first on; L lanes.
  void add(const TileSpans& spans, RowSpan r, int64_t L, const F* P, F* acc) {
    for (int64_t i = 0; i < odd_.n; ++i) {
      const int64_t j = odd_.row[i], at = j - r.first, slot = first_ + block_.place(j);
      if (j < r.first || j >= r.stop) continue;
      const F* x = value(j);
      for (int64_t t = 0; t < spans.count(); ++t) {
        if (!spans.at(t).holds(slot, slot + 1)) continue;
        F weight;
        if constexpr (kHasPairs<F>) weight = pairs_ ? of_pair(P[at / 2 * L + t], at) : P[at * L + t];
        else weight = P[at * L + t];
        for (int64_t v = 0; v < V_; ++v) acc[v * L + t] += weight * x[v];
      }
    }
  }

 private:
  // The values of row j, as numbers.
  const F* value(int64_t j) {
    if (!pairs_) return block_.values + j * block_.vs;
    const auto& stored = slots_.stored_values();
    read_row<F>(stored.row(first_ + block_.place(j)), stored.dtype, V_, row_);
    return row_;
  }

  const Slots<F>& slots_;
  int64_t V_;
  bool pairs_;
  F *clean_, *row_;
  SlotBlock<F> block_;
  int64_t first_ = 0;
  OddRows odd_;
};

}  // namespace mk::MK_ISA
