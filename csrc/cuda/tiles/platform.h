// What a kernel may use: the CUDA language, or the host runtime of tests/simt that runs the same source on the CPU. Everything
// the two spell differently is here, so a kernel has one text.
#pragma once

#include <cstdint>

#include "params/view.h"

#ifdef MK_SIMT
#include "simt.h"
#else
#include <cuda_runtime.h>
// Two blocks to a processor is the least asked for: without a number the compiler keeps registers so few that it spills.
#define MK_KERNEL(threads) MK_KERNEL_BLOCKS(threads, 2)
#define MK_KERNEL_BLOCKS(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define MK_PARAM(T) const __grid_constant__ T
#define MK_DEVICE __device__ __forceinline__
#endif

namespace mk::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2e = 1.4426950408889634f;

#ifndef MK_SIMT

// The dynamic shared memory of the block; the only kind that kernels use.
MK_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char mk_shared[];
  return mk_shared;
}

// 16 bytes from global to shared memory, both aligned to 16, without waiting; zeros where `whole` is false.
MK_DEVICE void copy16(void* to, const void* from, bool whole) {
  const unsigned at = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(whole ? 16 : 0) : "memory");
}
MK_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` groups of this thread are under way.
template <int pending>
MK_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Half precision as bits: the toolkit's own header for it takes longer to compile than a kernel.
MK_DEVICE float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
MK_DEVICE uint16_t half_from_float(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// Two numbers of 16 bits in one register, the first in the low half.
MK_DEVICE uint32_t half_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
MK_DEVICE uint32_t bf16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
// The tf32 number nearest to x.
MK_DEVICE uint32_t tf32_nearest(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
// 2^x; 0 where that is no normal number.
MK_DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x for x in [1, 2], to one unit in the last place.
MK_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x / y for y up to 1, to two units in the last place.
MK_DEVICE float quotient(float x, float y) { return __fdividef(x, y); }

// x, or 0 where it is above; a NaN stays one.
MK_DEVICE float at_most_zero(float x) {
  float y;
  asm("min.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

// x, unknown to the compiler: what depends on it is computed where it stands, and not kept in registers from before a loop.
MK_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
MK_DEVICE float opaque(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

// d += a b for a tile of 16 rows and 8 columns, in the fragments of the PTX ISA. Depth 16 for 16-bit numbers, 8 for tf32. All lanes.
#define MK_MMA(name, shape)                                                                          \
  MK_DEVICE void name(float(&d)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {               \
    asm("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                             \
  }
MK_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
MK_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
MK_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef MK_MMA

// Four matrices of 8 rows of 16 bytes in shared memory: lane 8 m + r says where row r of matrix m begins. All lanes.
MK_DEVICE void ldmatrix(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
}
MK_DEVICE void ldmatrix_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
}

#endif

template <class T>
MK_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(kAllLanes, x, d);
  return x;
}

MK_DEVICE float warp_max(float x) {
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, d));
  return x;
}

// e^x; 0 for -inf.
MK_DEVICE float exponential(float x) { return exp2f(x * kLog2e); }

// The softmax weight e^x. x is a score less the log-sum-exp or the largest score that another kernel found, at most 0 but for what
// rounding makes of the same score there and here; at scores of 1e9 that is whole units, but no weight is above 1.
MK_DEVICE float weight_of(float x) { return exponential(at_most_zero(x)); }

}  // namespace mk::cuda
