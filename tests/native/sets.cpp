// Sets the instruction set and the number of threads of the next call.
#include "pool.h"

namespace native {

std::string fault;

namespace {

mk::Isa chosen = mk::Isa::baseline;
int chosen_threads = 1;

}  // namespace

std::vector<mk::Isa> instruction_sets() {
  std::vector<mk::Isa> sets{mk::Isa::baseline};
#ifdef MK_HAVE_avx2
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) sets.push_back(mk::Isa::avx2);
  if (avx512) sets.push_back(mk::Isa::avx512);
  if (avx512 && __builtin_cpu_supports("avx512bf16")) sets.push_back(mk::Isa::avx512bf16);
#endif
  return sets;
}

const char* name_of(mk::Isa isa) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512", "avx512bf16"};
  return names[int64_t(isa)];
}

void use(mk::Isa isa, int threads) {
  chosen = isa;
  chosen_threads = threads;
}
int wanted_threads() { return chosen_threads; }

}  // namespace native

mk::Isa mk::isa() { return native::chosen; }
