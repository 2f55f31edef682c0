// The two ceilings that benchmarks are compared with, measured on the machine.
#pragma once

#include <cstdint>
#include <string>

namespace memkernels::host {

// Peak rate of multiply-adds in registers, in FLOP/s of all threads (one multiply-add = 2): the best of many short
// rounds.
// dtype "float32", "float64" or "bfloat16". bfloat16 means the dot products of AVX512-BF16, and gives 0 if the
// processor has none. On some processors they are no faster than float32 multiply-adds, which can also serve bfloat16
// after widening.
// `isa` "baseline", "avx2" or "avx512" is the widest instruction set to use; empty: the widest there is.
// Throws std::invalid_argument for another dtype or isa, threads < 1 or seconds <= 0.
double multiply_add_peak(const std::string& dtype, int threads, double seconds, const std::string& isa);

// Bandwidth of summing an array of `bytes` bytes with all threads, in bytes per second: the best of as many passes as
// fit into `seconds`, at least three. Every other pass uses software prefetch. bytes 0 means default_bandwidth_bytes().
// Throws std::invalid_argument for bytes < 0, threads < 1 or seconds <= 0.
double read_bandwidth(int64_t bytes, int threads, double seconds);

// Four times the last-level cache, within [256 MiB, 1 GiB]. The upper bound keeps the first touch short where a virtual
// machine reports the cache of the whole socket: 1 GiB is still almost four times 260 MB. A sequential pass over an
// array larger than the cache evicts each line before it is read again.
int64_t default_bandwidth_bytes();

}  // namespace memkernels::host
