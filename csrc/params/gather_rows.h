#pragma once

#include "params/choice.h"

namespace mk {

// out[j] = scale[i, c] * values[i] with i = indices[j] and c the block of a column; zeros where i is -1. Everything but
// the rows of `values` and `scale` is contiguous.
struct GatherRows {
  int64_t count, N, V;
  const int64_t* indices;  // [count]
  const char* values;      // [N, V], `row` bytes from row to row
  DType dtype;
  int64_t row;
  const char* scale;  // [N, ceil(V / block)] in float32 or e8m0, `scale_row` bytes from row to row; null beside floats
  DType scale_dtype;
  int64_t scale_row, block;
  char* out;  // [count, V]; double if `dtype` is, or 8 bits
  DType out_dtype;
};

// d_values[i] = sum of d_rows[j] over the entries j with indices[j] = i, in their order.
struct GatherRowsBackward {
  Choice choice;  // every entry is a token with one index
  int64_t V;
  View d_rows;
  MemoryGradient d_values;
};

}  // namespace mk

// Gathers, and returns -1; or gathers nothing and returns an index outside [-1, N).
MK_DECLARE(int64_t, gather_rows, GatherRows)
MK_DECLARE(void, gather_rows_backward, GatherRowsBackward)
