// The processor: model, instruction sets, caches, cores. Knows neither torch nor Python.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace memkernels::host {

// Model name as the processor or the operating system reports it; "unknown" if neither does.
std::string processor_name();

// Instruction-set extension -> usable: the processor has it and the operating system saves its registers. Names are
// those of /proc/cpuinfo on x86 (sse2, avx512_bf16, amx_tile ...) and "neon" on Arm; elsewhere the map is empty.
std::map<std::string, bool> features();

// Bytes: "l1d" and "l2" of one core, "l3" of the whole shared cache, "line" of one cache line. 0 = unknown or none.
std::map<std::string, int64_t> caches();

// The numbers of the cores that this process may run on.
std::vector<int> usable_cores();

// Keeps the calling thread on one core.
void pin(int core);

}  // namespace memkernels::host
