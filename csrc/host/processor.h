// What the processor is: model, instruction sets, caches, cores. Free of torch and of Python.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace memkernels::host {

// Model name as the processor or the operating system gives it; "unknown" where neither does.
std::string processor_name();

// Instruction-set extension -> usable, which means that the processor has it and the operating system saves its
// registers. The names are those of /proc/cpuinfo on x86 (sse2, avx512_bf16, amx_tile ...); on Arm "neon"; elsewhere
// empty.
std::map<std::string, bool> features();

// Bytes: "l1d" and "l2" of one core, "l3" of the whole cache that cores share, "line" of one cache line. 0 = unknown
// or none.
std::map<std::string, int64_t> caches();

// The processors this process may run on, by their number.
std::vector<int> usable_cores();

}  // namespace memkernels::host
