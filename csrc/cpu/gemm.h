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
  // Where A comes from memory, row by row, and is used for few lanes: what lies so many elements further on is asked for, a line
  // for a line. Asked for in one go between products it stalls them: topk_search N=2^20 K=64, one core, T=16
  // 36.7 -> 34.1 ms, T=32 54.8 -> 41.8.
  int64_t ahead = 0;
};

}  // namespace mk

MK_DECLARE(void gemm(const Gemm<float>&))
MK_DECLARE(void gemm(const Gemm<double>&))
