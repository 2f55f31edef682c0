// The products of gradients where tokens have ranges and some rows are odd (odd_rows.h).
#pragma once

#include "cpu/tiles/gradient_shape.h"
#include "cpu/tiles/odd_rows.h"

namespace mk::MK_ISA {

// A tile of n tokens and part of a block, whose rows of the block are `rows`; how P and D lie.
template <class F>
struct OddTile {
  const BlockPart<F>& part;
  RowSpan rows;
  const TileSpans& spans;
  int64_t n, L;
  TileStrides<F> at;
};

template <class F>
class OddProducts {
 public:
  OddProducts(const GradientShape<F>& s, const Slots<F>& slots, const ChunkMemory<F>& w)
      : s_(s), slots_(slots), w_(w) {}

  // The rows of a block whose keys are odd. Makes copies of the keys without them, or changes pairs of slots in place.
  OddRows find_keys(const SlotBlock<F>& block, int64_t first) const {
    const OddRows odd = OddRows::find<F>(block.n, s_.K, [&](int64_t j) { return key(block, first, j); });
    if constexpr (kHasPairs<F>) {
      for (int64_t i = 0; s_.pairs && i < odd.n; ++i) zero_pair(w_.keys2, s_.KP, s_.KP, odd.row[i]);
    }
    if (odd.n > 0 && !s_.pairs) copy_finite<F>(block.keys, block.ks, block.n, s_.KP, odd, w_.keys, s_.KP);
    return odd;
  }

  // `rows` with copies of those of tokens, the odd ones zero.
  ProductRows<F> finite_tokens(ProductRows<F> rows, const OddRows& odd, int64_t n) const {
    copy_tokens(rows.queries, odd, n, s_.KP, w_.queries);
    copy_tokens(rows.reads, odd, n, s_.VP, w_.reads);
    return rows;
  }

  // What odd tokens, of which `rows` has the originals, add to dk and dv of the slots that they may address.
  void add_tokens(const OddTile<F>& o, const OddRows& odd, const ProductRows<F>& rows, bool keys, bool values) const {
    for (int64_t i = 0; i < odd.n; ++i) {
      const int64_t t = odd.row[i];
      const RowSpan own = rows_within(o.part.block, o.part.first, o.spans.at(t));
      for (int64_t j = own.first; j < own.stop; ++j) {
        if (values) add(element(o, w_.P, t, j), rows.reads, t, s_.V, s_.VP, rows.dv + j * s_.VP);
        if (keys) add(element(o, w_.D, t, j), rows.queries, t, s_.K, s_.KP, rows.dk + j * s_.KP);
      }
    }
  }

  // What odd keys add to dq of the tokens that may address them.
  void add_keys(const OddTile<F>& o, const OddRows& odd, F* dq) const {
    for (int64_t i = 0; i < odd.n; ++i) {
      const int64_t row = odd.row[i] - o.rows.first;
      if (row < 0 || row >= o.rows.count()) continue;
      const int64_t slot = o.part.first + o.part.block.place(row);
      const F* k = key(o.part.block, o.part.first, row);
      for (int64_t t = 0; t < o.n; ++t) {
        if (!o.spans.at(t).holds(slot, slot + 1)) continue;
        const F d = element(o, w_.D, t, row);
        for (int64_t c = 0; c < s_.K; ++c) dq[t * s_.KP + c] += d * k[c];
      }
    }
  }

 private:
  // The key of row j, as numbers.
  const F* key(const SlotBlock<F>& block, int64_t first, int64_t j) const {
    if (!s_.pairs) return block.keys + j * block.ks;
    read_row<F>(slots_.stored_keys().row(first + block.place(j)), slots_.stored_keys().dtype, s_.K, w_.row);
    return w_.row;
  }
  void copy_tokens(const F*& rows, const OddRows& odd, int64_t n, int64_t width, F* to) const {
    if (rows == nullptr) return;
    if constexpr (kHasPairs<F>) {
      if (s_.pairs) {
        std::copy_n(rows, div_up(n, 2) * width, to);
        for (int64_t i = 0; i < odd.n; ++i) zero_pair(to, width, width, odd.row[i]);
        rows = to;
        return;
      }
    }
    copy_finite<F>(rows, width, n, width, odd, to, width);
    rows = to;
  }
  // Element (token t, row j) of P or D.
  F element(const OddTile<F>& o, const F* X, int64_t t, int64_t j) const {
    if constexpr (kHasPairs<F>) {
      if (s_.pairs) return of_pair(X[j * o.L / 2 + t / 2], t);
    }
    return X[t * o.at.ts + j * o.at.is];
  }
  // to[c] += factor * row t of `rows`.
  void add(F factor, const F* rows, int64_t t, int64_t width, int64_t stride, F* to) const {
    for (int64_t c = 0; c < width; ++c) {
      F x;
      if constexpr (kHasPairs<F>) x = s_.pairs ? of_pair(rows[t / 2 * stride + c], t) : rows[t * stride + c];
      else x = rows[t * stride + c];
      to[c] += factor * x;
    }
  }

  const GradientShape<F>& s_;
  const Slots<F>& slots_;
  const ChunkMemory<F>& w_;
};

}  // namespace mk::MK_ISA
