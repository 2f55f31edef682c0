// The check of indices given by a caller: one pass over 8 bytes per index, little beside the K or V numbers that each
// index selects.
#include <atomic>

#include "cpu/tiles/indices.h"
#include "cpu/tiles/parallel.h"

namespace mk::MK_ISA {

int64_t wrong_index(const Choice& c) {
  const int64_t all = c.all_tokens(), step = most(1, 65536 / most(c.k, 1));
  std::atomic<int64_t> wrong{-1};
  parallel(div_up(all, step), 0, [&](int64_t task, char*) {
    const int64_t found = wrong_among(c, task * step, least(all, (task + 1) * step));
    if (found != -1) wrong.store(found, std::memory_order_relaxed);
  });
  return wrong.load();
}

}  // namespace mk::MK_ISA
