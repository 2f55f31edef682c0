// The two ceilings every benchmark is held against, measured on the machine rather than looked up.
#pragma once

#include <cstdint>
#include <string>

namespace memkernels::host {

// Multiply-adds in registers alone, in FLOP/s of all threads together (one multiply-add = 2). The best of many short
// rounds.
// dtype "float32", "float64" or "bfloat16": the dot products of AVX512-BF16, 0 where the processor has none. On some
// processors they are no faster than float32 multiply-adds, which bfloat16 may use too after widening.
// `isa` "baseline", "avx2" or "avx512" is the widest instruction set to use; empty: the widest there is.
// Throws std::invalid_argument for another dtype or isa, threads < 1 or seconds <= 0.
double multiply_add_peak(const std::string& dtype, int threads, double seconds, const std::string& isa);

// Sum of an array of `bytes` bytes by all threads, in bytes per second. The best of as many passes as fit into
// `seconds`, at least three; every other one asks for what follows. bytes 0 chooses default_bandwidth_bytes(). Throws
// std::invalid_argument for bytes < 0, threads < 1 or seconds <= 0.
double read_bandwidth(int64_t bytes, int threads, double seconds);

// Four times the last-level cache, within [256 MiB, 1 GiB]. The upper bound keeps first touch short where a virtual
// machine reports the whole socket's cache: of 260 MB, 1 GiB is still almost four times, and a sequential pass over
// an array larger than the cache evicts each line before it is read again.
int64_t default_bandwidth_bytes();

}  // namespace memkernels::host
