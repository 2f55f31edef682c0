#pragma once

#include "params/gated_write.h"

namespace mk {

// For t = 1 .. T, where token_mask[t]: the gated write of `write` (erase 1; its `query` asks where to write, `out` takes the new
// values, which must not be `values`; there is no `retained`), then a read of what memory holds: r_t = sum_i p[t, i] v_i, p the
// softmax of scale <read_query_t, key_i> + mask_i. With `read_first` the read comes before the write.
struct MemoryScan {
  GatedWrite write;
  View read_query, reads, lse, lse_rest;
  bool read_first;
};

// Gradients, float (double for double); a missing one is not wanted. d_keys, d_values and d_mask are summed over leading
// dimensions in which their stride is 0. d_reads and d_out may be missing.
struct MemoryScanBackward {
  MemoryScan forward;
  View d_reads, d_out;
  View d_values, d_keys, d_read_query, d_write_query, d_write, d_mask;
};

}  // namespace mk

MK_DECLARE(void, memory_scan, MemoryScan)
MK_DECLARE(void, memory_scan_backward, MemoryScanBackward)
