// Ranges of slots: token t addresses the slots [first, stop) alone. A block of tokens looks only at the slots of their
// span; where a range leaves out some of them, scores are replaced by -inf and products by zero: NaN there reaches no
// token.
#pragma once

#include "cuda/tiles/numbers.h"

namespace mk::cuda {

struct SlotRange {
  int64_t first, stop;
  MK_BOTH bool holds(int64_t slot) const { return first <= slot && slot < stop; }
  MK_BOTH bool meets(int64_t begin, int64_t end) const { return first < end && begin < stop; }
};

// The range of token t, within [0, N); {N, 0} if it is empty or there is no such token. `ranges` [T, 2] is given.
MK_DEVICE SlotRange range_of(const View& ranges, const Lead& lead, int64_t batch, int64_t T, int64_t t, int64_t N) {
  if (t >= lead.folded() * T) return {N, 0};
  const auto* pair = reinterpret_cast<const int64_t*>(token_row(ranges, lead, ranges.batch(lead, batch), T, t));
  const SlotRange r{most(0, pair[0]), least(N, pair[1])};
  return r.first < r.stop ? r : SlotRange{N, 0};
}

// All slots that some of `count` tokens may address: [first, stop).
MK_DEVICE SlotRange span_of(const SlotRange* ranges, int count) {
  SlotRange span = ranges[0];
  for (int i = 1; i < count; ++i) {
    span.first = least(span.first, ranges[i].first), span.stop = most(span.stop, ranges[i].stop);
  }
  return span;
}

}  // namespace mk::cuda
