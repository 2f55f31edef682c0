#pragma once

#include "params/isa.h"
#include "params/view.h"

namespace mk {

// lse[t] = log sum_s exp(lses[s, t]) and read[t] = sum_s exp(lses[s, t] - lse[t]) reads[s, t]. Every leading dimension
// is folded into the tokens; part s lies *_part bytes behind part 0.
struct MergeReads {
  Lead lead;
  int64_t S, T, V;
  View reads, lses;
  int64_t reads_part, lses_part;
  View read, lse;
};

// Its gradients. A missing d_read or d_lse is zero; a missing d_reads or d_lses is not wanted.
struct MergeReadsBackward {
  MergeReads forward;  // without its results
  View d_read, d_lse;
  View d_reads, d_lses;
  int64_t d_reads_part, d_lses_part;
};

}  // namespace mk

MK_DECLARE(void, merge_reads, MergeReads)
MK_DECLARE(void, merge_reads_backward, MergeReadsBackward)
