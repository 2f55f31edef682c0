// The one matrix product of the library: C[M][L] (+)= A[M][k] * B[k][L], lanes along L.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace mk {

// A is read as scalars: element (m, k) at a[m * rs + k * cs], and rs or cs is 1: A or its transpose, as it lies in memory.
// B and C are rows of L lanes with strides ldb and ldc. L is a multiple of the register width.
template <class F>
struct Gemm {
  int64_t M, L, k;
  const F* a;
  int64_t rs, cs;
  const F* b;
  int64_t ldb;
  F* c;
  int64_t ldc;
  bool accumulate;
};

}  // namespace mk

MK_DECLARE(void gemm(const Gemm<float>&))
MK_DECLARE(void gemm(const Gemm<double>&))
