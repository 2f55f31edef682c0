// The check of indices that a caller made: one pass, 8 bytes per index, beside the K or V numbers that each index
// stands for.
#include <atomic>

#include "cpu/tiles/parallel.h"
#include "params/choice.h"

namespace mk::MK_ISA {

int64_t wrong_index(const Choice& c) {
  const int64_t tokens = c.tokens(), all = c.all_tokens(), step = most(1, 65536 / most(c.k, 1));
  std::atomic<int64_t> wrong{-1};
  parallel(div_up(all, step), 0, [&](int64_t task, char*) {
    const int64_t end = least(all, (task + 1) * step);
    for (int64_t t = task * step; t < end; ++t) {
      const TokenRows rows(c.indices, c.lead, t / tokens, c.T);
      const auto* index = reinterpret_cast<const int64_t*>(rows.row(t % tokens));
      bool outside = false;
      for (int64_t j = 0; j < c.k; ++j) outside |= uint64_t(index[j]) + 1 > uint64_t(c.N);
      for (int64_t j = 0; outside && j < c.k; ++j) {
        if (index[j] < -1 || index[j] >= c.N) wrong.store(index[j], std::memory_order_relaxed);
      }
    }
  });
  return wrong.load();
}

}  // namespace mk::MK_ISA
