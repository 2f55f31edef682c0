// The check of indices that a caller gave: kernels read no row before its number has been checked.
#pragma once

#include "cpu/tiles/simd.h"
#include "params/choice.h"

namespace mk::MK_ISA {

// Is one of the indices outside [-1, N)?
inline bool any_outside(const int64_t* index, int64_t n, int64_t N) {
  using Lanes = Ints<double>;
  constexpr int W = kLanes<double>;
  Lanes outside = {};
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    Lanes x;
    std::memcpy(&x, index + j, sizeof x);
    outside |= (x < -1) | (x >= N);
  }
  bool found = any<double>(outside);
  for (; j < n; ++j) found |= index[j] < -1 || index[j] >= N;
  return found;
}

// An index outside [-1, N) of tokens [first, end), counted over all batches; -1 if there is none.
inline int64_t wrong_among(const Choice& c, int64_t first, int64_t end) {
  if (c.k == 0) return -1;
  const int64_t tokens = c.tokens();
  TokenRows rows;
  for (int64_t t = first, last; t < end; t = last) {
    if (t == first || t % tokens == 0) rows = TokenRows(c.indices, c.lead, t / tokens, c.T);
    // Tokens that lie one after the other are one row.
    const bool adjacent = rows.folds == 0 && rows.stride == c.k * int64_t(sizeof(int64_t));
    last = adjacent ? least(end, (t / tokens + 1) * tokens) : t + 1;
    const auto* index = reinterpret_cast<const int64_t*>(rows.row(t % tokens));
    const int64_t n = (last - t) * c.k;
    if (!any_outside(index, n, c.N)) continue;
    for (int64_t j = 0; j < n; ++j) {
      if (index[j] < -1 || index[j] >= c.N) return index[j];
    }
  }
  return -1;
}

}  // namespace mk::MK_ISA
