// What a kernel may use: the CUDA language, or the host runtime of tests/simt that runs the same source on the CPU. Everything
// the two spell differently is here, so a kernel has one text.
#pragma once

#include <cstdint>

#include "common/view.h"

#ifdef MK_SIMT
#include "simt.h"
#else
#include <cuda_runtime.h>
// Two blocks to a processor is the least asked for: without a number the compiler keeps registers so few that it spills.
#define MK_KERNEL(threads) __global__ void __launch_bounds__(threads, 2)
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

}  // namespace mk::cuda
