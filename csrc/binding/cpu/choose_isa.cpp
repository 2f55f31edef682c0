#include <cstdlib>
#include <stdexcept>
#include <string>

#include "params/isa.h"

namespace mk {
namespace {

bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == Isa::avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  if (isa == Isa::avx512) {
    return supported(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (isa == Isa::avx512bf16) return supported(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
#endif
  return isa == Isa::baseline;
}

// A product of pairs is two multiply-adds. Zen 4 and 5 start as many of either in a cycle; the Intel processors measured start half as
// many (model 207: 352 GFLOP/s both ways), so that float32 is as fast and rounds no weights.
bool fast_pairs() {
#if defined(__x86_64__)
  return supported(Isa::avx512bf16) && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

Isa choose() {
  constexpr const char* names[] = {"baseline", "avx2", "avx512", "avx512bf16"};
  const char* forced = std::getenv("MEMKERNELS_CPU_ISA");
  if (forced != nullptr && *forced != '\0') {
    for (int64_t i = 0; i < 4; ++i) {
      if (std::string(forced) != names[i]) continue;
      if (supported(Isa(i))) return Isa(i);
      throw std::runtime_error(std::string("MEMKERNELS_CPU_ISA: this processor has no ") + forced);
    }
    throw std::runtime_error(std::string("MEMKERNELS_CPU_ISA must be baseline, avx2, avx512 or avx512bf16, got ") +
                             forced);
  }
  if (fast_pairs()) return Isa::avx512bf16;
  for (Isa isa : {Isa::avx512, Isa::avx2}) {
    if (supported(isa)) return isa;
  }
  return Isa::baseline;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace mk
