// The one matrix product of the library: C[M][L] (+)= A[M][k] * B[k][L], lanes along L.
#pragma once

#include <cstdint>

#include "params/isa.h"

namespace mk {

// What a product is of: numbers, or pairs of bfloat16.
enum class Of { numbers, pairs };

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
  // Where A comes from memory, row by row: what lies so many elements further on is asked for, a line for a line, full tiles only.
  // More than the core has line buffers, asked for in one go between products, stalls them: topk_read, one core, T=256 N=2^18 K=V=64
  // 1.09x, T=1024 N=65536 K=V=128 1.09x; topk_search T=16 K=64 N=2^20 1.08x, N=65536 1.37x, N=2048 0.98x.
  int64_t ahead = 0;
  // The same of B, for A of few rows: elements from a row of B to the one to ask for with it.
  int64_t ahead_b = 0;
  // With `accumulate`: the product is summed by itself and added last. A sum over many calls then has two levels, and goes on where
  // one that every term is added to stops, at 2^24 equal terms; it costs a small product 10% (cell_scan, 8 x 192 x 64).
  bool apart = false;
};

}  // namespace mk

namespace mk::MK_ISA {

void gemm(const Gemm<float>&);
void gemm(const Gemm<double>&);

// The same of bfloat16: an element of A or B is a pair of numbers, neighbours along k, as they lie in memory; strides and k count
// pairs, and c = factor * the products unless it accumulates. For Isa::avx512bf16.
void gemm_pairs(const Gemm<float>&, float factor);

}  // namespace mk::MK_ISA
