#pragma once

#include "params/isa.h"
#include "params/view.h"

namespace mk {

// One step of Adam over the rows of a table that have a gradient. All rows are contiguous.
struct SparseAdam {
  int64_t count, V;
  const int64_t* slots;  // [count], distinct and in range
  const char* gradient;  // [count, V], dtype of `values`
  char* values;          // [N, V]
  DType dtype;
  char *first, *second;                 // [N, V] moments, float; double for double
  double step_size, beta1, beta2, eps;  // step_size: lr sqrt(1 - beta2^t) / (1 - beta1^t)
};

}  // namespace mk

MK_DECLARE(void, sparse_adam, SparseAdam)
