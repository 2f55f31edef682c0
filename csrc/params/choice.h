#pragma once

#include "params/isa.h"
#include "params/view.h"

namespace mk {

// The slots that tokens chose: indices [lead, T, k], -1 for none.
struct Choice {
  Lead lead;
  int64_t T, k, N;
  View indices;

  MK_BOTH int64_t tokens() const { return lead.folded() * T; }  // of one batch
  MK_BOTH int64_t all_tokens() const { return lead.batches() * tokens(); }
};

// A gradient of memory, written whole: contiguous [own leading dimensions, N, width], in all `rows` rows. `zero`: it is
// zero already.
struct MemoryGradient {
  View view;
  int64_t rows = 0;
  bool zero = false;

  MK_BOTH explicit operator bool() const { return bool(view); }
};

}  // namespace mk

// An index that is not in [-1, N), if there is one; else -1. Kernels trust indices: this comes before them.
MK_DECLARE(int64_t, wrong_index, Choice)
