// The one matrix product of the library: C[M][L] (+)= A[M][k] * B[k][L], lanes along L.
#pragma once

#include <cstdint>

#include "params/isa.h"

namespace mk {

// The elements of a product: numbers, or pairs of bfloat16.
enum class Of { numbers, pairs };

// Element (m, k) of A is at a[m * rs + k * cs], where rs or cs is 1: A or its transpose, as it lies in memory. B and C
// are rows of L lanes with strides ldb and ldc. L is a multiple of the register width.
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
  // If A comes from memory row by row: the prefetch distance in elements, one cache line per line consumed, in full
  // tiles only. A burst of prefetches between products would stall the core once its line buffers are full. Gains:
  // topk_read, one core, T=256 N=2^18 K=V=64 1.09x, T=1024 N=65536 K=V=128 1.09x; topk_search T=16 K=64 N=2^20 1.08x,
  // N=65536 1.37x, N=2048 0.98x.
  int64_t ahead = 0;
  // The same for B, if A has few rows: elements from a row of B to the row to prefetch with it.
  int64_t ahead_b = 0;
  // With `accumulate`: the product is summed by itself and added at the end, so a sum over many calls has two levels. A
  // float sum that takes every term directly stops changing at 2^24 equal terms. Costs a small product 10% (cell_scan,
  // 8 x 192 x 64).
  bool apart = false;
};

}  // namespace mk

namespace mk::MK_ISA {

void gemm(const Gemm<float>&);
void gemm(const Gemm<double>&);

// The same for bfloat16. An element of A or B is a pair of neighbours along k, as they lie in memory; strides and k
// count pairs. c = factor * the product, unless it accumulates. For Isa::avx512bf16.
void gemm_pairs(const Gemm<float>&, float factor);

}  // namespace mk::MK_ISA
