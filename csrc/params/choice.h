#pragma once

#include "params/isa.h"
#include "params/view.h"

namespace mk {

// The slots chosen for each token: indices [lead, T, k], -1 for none.
struct Choice {
  Lead lead;
  int64_t T, k, N;
  View indices;

  MK_BOTH int64_t tokens() const { return lead.folded() * T; }  // of one batch
  MK_BOTH int64_t all_tokens() const { return lead.batches() * tokens(); }
};

// A gradient of memory, written whole: contiguous [own leading dimensions, N, width], `rows` rows in all. `zero`: the
// memory is already zero.
struct MemoryGradient {
  View view;
  int64_t rows = 0;
  bool zero = false;

  MK_BOTH explicit operator bool() const { return bool(view); }
};

}  // namespace mk

// Returns an index outside [-1, N), or -1 if there is none. Kernels trust indices, so this runs before them.
MK_DECLARE(int64_t, wrong_index, Choice)
