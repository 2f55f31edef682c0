#pragma once

#include "params/isa.h"
#include "params/view.h"

namespace mk {

// slots[t, m] = offset_m + (XOR_{j < orders[m / heads]} x[t - j] multipliers[j]) mod sizes[m]. All leading dimensions
// are folded into streams of T tokens.
struct NgramSlots {
  Lead lead;
  int64_t T, M, heads, pad;
  View tokens, history, first;  // rows of int64: [T], [n_max - 1], [T]; the last two may be missing
  const int64_t* sizes;         // [M]
  const int64_t* multipliers;   // [n_max]
  int64_t n_max;
  const int64_t* orders;     // [M / heads]
  const int64_t* token_map;  // [vocabulary], or null
  int64_t vocabulary;
  const int64_t* ignore;  // [ignored]
  int64_t ignored;
  int64_t* slots;  // [lead, T, M], contiguous
};

}  // namespace mk

// Fills `slots` and returns -1, or returns a token that is not below `vocabulary`; then some slots are not written.
MK_DECLARE(int64_t, ngram_slots, NgramSlots)
