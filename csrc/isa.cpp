#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

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
#endif
  return isa == Isa::baseline;
}

Isa choose() {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  const char* forced = std::getenv("MEMKERNELS_CPU_ISA");
  if (forced != nullptr && *forced != '\0') {
    for (int64_t i = 0; i < 3; ++i) {
      if (std::string(forced) != names[i]) continue;
      if (supported(Isa(i))) return Isa(i);
      throw std::runtime_error(std::string("MEMKERNELS_CPU_ISA: this processor has no ") + forced);
    }
    throw std::runtime_error(std::string("MEMKERNELS_CPU_ISA must be baseline, avx2 or avx512, got ") + forced);
  }
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
