// A small SIMT runtime on the CPU. It runs the source of the CUDA kernels, block after block, with a fiber per thread.
//
// A fiber runs until it meets other threads: a barrier, a shuffle, a vote, a matrix product. Between barriers warps run
// one after the other in an order drawn from a seed, so that with a missing barrier some thread sees what another has
// not written yet. Shared memory is NaN when a block begins. A copy in flight (cp.async) leaves NaN at its target until
// it is waited for. A block whose threads wait for each other in vain ends the program with a message.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define MK_KERNEL(threads) void
#define MK_KERNEL_BLOCKS(threads, blocks) void
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

// The environment variable MEMKERNELS_SIMT_SEED sets the order of fibers and blocks at the start of the program.
void launch(int64_t blocks, int threads, int64_t shared, const std::function<void()>& kernel);

char* shared();
void barrier();
// What a lane passes in when its warp meets, and what it receives.
struct Hand {
  uint64_t number;
  uint32_t a[4], b[2];
  float d[4];
};
// All 32 lanes of the warp pass in a hand. The last one calls `finish` on all hands, in lane order, if it is given.
// Each lane may read them afterwards.
const Hand* meet(const Hand& mine, void (*finish)(Hand*) = nullptr);
// Every lane passes in a number.
inline const Hand* exchange(uint64_t mine) { return meet({mine, {}, {}, {}}); }
// `finish` for the matrix instructions; simt.cpp has their layouts.
void multiply_bf16(Hand*);
void multiply_f16(Hand*);
void multiply_tf32(Hand*);
void load_matrices(Hand*);
void load_matrices_transposed(Hand*);
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
  return simt::unpack<T>(simt::exchange(simt::pack(x))[from & 31].number);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return simt::unpack<T>(simt::exchange(simt::pack(x))[simt::lane() ^ mask].number);
}
template <class T>
T __shfl_up_sync(unsigned, T x, int by) {
  const simt::Hand* all = simt::exchange(simt::pack(x));
  return simt::unpack<T>(all[simt::lane() < by ? simt::lane() : simt::lane() - by].number);
}
inline unsigned __ballot_sync(unsigned, bool on) {
  const simt::Hand* all = simt::exchange(on);
  unsigned mask = 0;
  for (int i = 0; i < 32; ++i) mask |= unsigned(all[i].number != 0) << i;
  return mask;
}
inline bool __any_sync(unsigned m, bool on) { return __ballot_sync(m, on) != 0; }
inline unsigned __match_any_sync(unsigned, unsigned x) {
  const simt::Hand* all = simt::exchange(x);
  unsigned mask = 0;
  for (int i = 0; i < 32; ++i) mask |= unsigned(all[i].number == x) << i;
  return mask;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(unsigned(x)) + 1; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
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
inline int opaque(int x) { return x; }
inline float opaque(float x) { return x; }
inline float at_most_zero(float x) { return x > 0 ? 0.f : x; }
inline float power_of_two(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float quotient(float x, float y) { return x / y; }
inline uint32_t half_pair(float low, float high) {
  return uint32_t(half_from_float(high)) << 16 | half_from_float(low);
}
inline uint32_t bf16_pair(float low, float high) {
  auto bits = [](float x) -> uint32_t {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    return x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  };
  return bits(high) << 16 | bits(low);
}
inline uint32_t tf32_nearest(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  return x - x != 0 ? u : (u + 0x1000) & 0xffffe000;
}

namespace matrix {
inline void multiply(void (*how)(simt::Hand*), float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const simt::Hand& mine =
      simt::meet({0, {a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}}, how)[simt::lane()];
  std::memcpy(d, mine.d, sizeof d);
}
inline void load(void (*how)(simt::Hand*), uint32_t (&out)[4], const void* row) {
  const simt::Hand& mine = simt::meet({uint64_t(reinterpret_cast<uintptr_t>(row)), {}, {}, {}}, how)[simt::lane()];
  std::memcpy(out, mine.a, sizeof out);
}
}  // namespace matrix
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  matrix::multiply(simt::multiply_bf16, d, a, b0, b1);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  matrix::multiply(simt::multiply_f16, d, a, b0, b1);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  matrix::multiply(simt::multiply_tf32, d, a, b0, b1);
}
inline void ldmatrix(uint32_t (&out)[4], const void* row) { matrix::load(simt::load_matrices, out, row); }
inline void ldmatrix_transposed(uint32_t (&out)[4], const void* row) {
  matrix::load(simt::load_matrices_transposed, out, row);
}
}  // namespace mk::cuda
