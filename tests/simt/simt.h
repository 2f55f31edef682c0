// A small SIMT machine on the CPU: runs the source of the CUDA kernels, block after block, a block's threads as fibers.
//
// A fiber runs until it meets other threads: a barrier, a shuffle, a vote. Between barriers warps run one after the other, in an
// order drawn from a seed, so a missing barrier lets some thread see what another has not written yet. Shared memory is NaN when a block begins, and a copy in
// flight (cp.async) is NaN where it will land until it is waited for. A block whose threads wait for each other in vain ends the
// program with a sentence.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define MK_KERNEL(threads) void
#define MK_PARAM(T) const T
#define MK_DEVICE inline
using std::isinf;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
extern Index3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
using cudaError_t = int;

namespace simt {

// Fibers and blocks go on in an order that the environment variable MEMKERNELS_SIMT_SEED sets when the program begins.
void launch(int64_t blocks, int threads, int64_t shared, const std::function<void()>& kernel);

char* shared();
void barrier();
// All 32 lanes of the warp hand in a number; afterwards each may look at those of all.
const uint64_t* exchange(uint64_t mine);
int lane();
void copy(void* to, const void* from, bool whole);
void commit();
void wait(int pending);

template <class T>
uint64_t pack(T x) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t u = 0;
  std::memcpy(&u, &x, sizeof x);
  return u;
}
template <class T>
T unpack(uint64_t u) {
  T x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

}  // namespace simt

inline void __syncthreads() { simt::barrier(); }
inline void __syncwarp() { simt::exchange(0); }
template <class T>
T __shfl_sync(unsigned, T x, int from) {
  return simt::unpack<T>(simt::exchange(simt::pack(x))[from & 31]);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return simt::unpack<T>(simt::exchange(simt::pack(x))[simt::lane() ^ mask]);
}
template <class T>
T __shfl_up_sync(unsigned, T x, int by) {
  const uint64_t* all = simt::exchange(simt::pack(x));
  return simt::unpack<T>(all[simt::lane() < by ? simt::lane() : simt::lane() - by]);
}
inline unsigned __ballot_sync(unsigned, bool on) {
  const uint64_t* all = simt::exchange(on);
  unsigned mask = 0;
  for (int i = 0; i < 32; ++i) mask |= unsigned(all[i] != 0) << i;
  return mask;
}
inline bool __any_sync(unsigned m, bool on) { return __ballot_sync(m, on) != 0; }
inline unsigned __match_any_sync(unsigned, unsigned x) {
  const uint64_t* all = simt::exchange(x);
  unsigned mask = 0;
  for (int i = 0; i < 32; ++i) mask |= unsigned(all[i] == x) << i;
  return mask;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(unsigned(x)) + 1; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned atomicAdd(unsigned* at, unsigned x) {
  const unsigned was = *at;
  *at += x;
  return was;
}

namespace mk::cuda {
inline char* shared_memory() { return simt::shared(); }
inline void copy16(void* to, const void* from, bool whole) { simt::copy(to, from, whole); }
inline float half_to_float(uint16_t bits) { return float(std::bit_cast<_Float16>(bits)); }
inline uint16_t half_from_float(float x) { return std::bit_cast<uint16_t>(_Float16(x)); }
inline void commit_copies() { simt::commit(); }
template <int pending>
void wait_copies() {
  simt::wait(pending);
}
}  // namespace mk::cuda
