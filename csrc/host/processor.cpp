#include "host/processor.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <fstream>
#include <thread>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace memkernels::host {
namespace {

std::string trimmed(const std::string& text) {
  const auto begin = text.find_first_not_of(" \t\n");
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(" \t\n") - begin + 1);
}

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return trimmed(line);
}

// Parses cache sizes as /sys writes them: "48K" -> 49152.
int64_t parse_size(const std::string& text) {
  if (text.empty()) return 0;
  const int64_t number = std::stoll(text);
  if (text.back() == 'K') return number << 10;
  if (text.back() == 'M') return number << 20;
  return number;
}

#if defined(__x86_64__)
struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // leaves zeros if the leaf does not exist
  return r;
}

bool bit(uint32_t word, int position) { return (word >> position) & 1; }

// XCR0: the register files that the operating system saves on a context switch. The instruction needs OSXSAVE.
uint64_t saved_state(bool osxsave) {
  if (!osxsave) return 0;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}
#endif

}  // namespace

std::string processor_name() {
#if defined(__x86_64__)
  uint32_t words[12] = {};
  if (cpuid(0x80000000u, 0).eax >= 0x80000004u) {
    for (uint32_t i = 0; i < 3; ++i) {
      const Registers r = cpuid(0x80000002u + i, 0);
      words[4 * i] = r.eax, words[4 * i + 1] = r.ebx, words[4 * i + 2] = r.ecx, words[4 * i + 3] = r.edx;
    }
    const std::string text(reinterpret_cast<const char*>(words), sizeof(words));
    const std::string name = trimmed(text.substr(0, text.find('\0')));
    if (!name.empty()) return name;
  }
#endif
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    for (const char* key : {"model name", "CPU part"}) {
      if (line.rfind(key, 0) == 0) return trimmed(line.substr(line.find(':') + 1));
    }
  }
  return "unknown";
}

std::map<std::string, bool> features() {
#if defined(__x86_64__)
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  const uint64_t xcr0 = saved_state(bit(one.ecx, 27));
  const bool ymm = (xcr0 & 0x6) == 0x6;           // SSE and AVX state
  const bool zmm = ymm && (xcr0 & 0xe0) == 0xe0;  // opmask, upper halves, upper registers
  const bool tile = (xcr0 & 0x60000) == 0x60000;  // tile configuration and data
  const bool avx512f = zmm && bit(seven.ebx, 16);
  return {
      {"sse2", bit(one.edx, 26)},
      {"sse4_1", bit(one.ecx, 19)},
      {"avx", ymm && bit(one.ecx, 28)},
      {"fma", ymm && bit(one.ecx, 12)},
      {"f16c", ymm && bit(one.ecx, 29)},
      {"avx2", ymm && bit(seven.ebx, 5)},
      {"avx_vnni", ymm && bit(seven_one.eax, 4)},
      {"avx512f", avx512f},
      {"avx512dq", avx512f && bit(seven.ebx, 17)},
      {"avx512bw", avx512f && bit(seven.ebx, 30)},
      {"avx512vl", avx512f && bit(seven.ebx, 31)},
      {"avx512_vnni", avx512f && bit(seven.ecx, 11)},
      {"avx512_bf16", avx512f && bit(seven_one.eax, 5)},
      {"avx512_fp16", avx512f && bit(seven.edx, 23)},
      {"amx_tile", tile && bit(seven.edx, 24)},
      {"amx_bf16", tile && bit(seven.edx, 22)},
      {"amx_int8", tile && bit(seven.edx, 25)},
  };
#elif defined(__aarch64__)
  return {{"neon", true}};  // part of the base architecture
#else
  return {};
#endif
}

std::map<std::string, int64_t> caches() {
  std::map<std::string, int64_t> sizes = {{"l1d", 0}, {"l2", 0}, {"l3", 0}, {"line", 0}};
  const std::string root = "/sys/devices/system/cpu/cpu0/cache/index";
  for (int i = 0; i < 8; ++i) {
    const std::string entry = root + std::to_string(i) + "/";
    const std::string level = first_line(entry + "level"), type = first_line(entry + "type");
    if (level.empty() || type == "Instruction") continue;
    const std::string name = level == "1" ? "l1d" : "l" + level;
    if (sizes.count(name)) sizes[name] = parse_size(first_line(entry + "size"));
    sizes["line"] = parse_size(first_line(entry + "coherency_line_size"));
  }
#if defined(_SC_LEVEL1_DCACHE_SIZE)  // sandboxes may hide /sys; the C library reads the processor itself
  const std::pair<const char*, int> fallback[] = {{"l1d", _SC_LEVEL1_DCACHE_SIZE},
                                                  {"l2", _SC_LEVEL2_CACHE_SIZE},
                                                  {"l3", _SC_LEVEL3_CACHE_SIZE},
                                                  {"line", _SC_LEVEL1_DCACHE_LINESIZE}};
  for (const auto& [name, key] : fallback) {
    if (sizes[name] == 0) sizes[name] = std::max<int64_t>(sysconf(key), 0);
  }
#endif
  return sizes;
}

std::vector<int> usable_cores() {
  std::vector<int> cores;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    for (int i = 0; i < CPU_SETSIZE; ++i) {
      if (CPU_ISSET(i, &set)) cores.push_back(i);
    }
  }
  if (cores.empty()) {  // more cores than the set can hold: any numbering will do
    for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i) cores.push_back(int(i));
  }
  return cores;
}

void pin(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);  // if refused, only accuracy suffers
}

}  // namespace memkernels::host
