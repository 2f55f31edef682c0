// kernels <family> [--density=N] [--fault=NAME]: every N-th case of the grid for one family of kernels; exit status 1
// if one fails.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "kernels.h"

namespace {

struct Family {
  const char* name;
  void (*test)(const native::Case&);
};
constexpr Family kFamilies[] = {
    {"softmax_read", native::softmax_read},
    {"address", native::address},
    {"slot_usage", native::slot_usage},
    {"gated_write", native::gated_write},
    {"topk_search", native::topk_search},
    {"topk_read", native::topk_read},
    {"slot_write", native::slot_write},
    {"softmax_write", native::softmax_write},
    {"sparse_read", native::sparse_read},
    {"sparse_write", native::sparse_write},
    {"merge_reads", native::merge_reads},
    {"gated_scan", native::gated_scan},
    {"cell_scan", native::cell_scan},
    {"memory_scan", native::memory_scan},
    {"additive_read", native::additive_read},
    {"cache_logprobs", native::cache_logprobs},
    {"cache_nll", native::cache_nll},
    {"product_key_search", native::product_key_search},
    {"product_key_read", native::product_key_read},
};

}  // namespace

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  int density = 1;
  for (int i = 2; i < argc; ++i) {
    const std::string option = argv[i];
    if (option.starts_with("--density=")) density = std::atoi(option.c_str() + 10);
    else if (option.starts_with("--fault=")) native::fault = option.substr(8);
    else return std::fprintf(stderr, "unknown option %s\n", argv[i]), 2;
  }
  for (const Family& family : kFamilies) {
    if (wanted != family.name) continue;
    int64_t cases = 0;
    native::each_case(density, [&](const native::Case& c) { family.test(c), ++cases; });
    std::printf("%s: %lld cases, %lld runs compared, %lld failures; instruction sets:", family.name, (long long)cases,
                (long long)native::tally.runs, (long long)native::tally.failures);
    for (mk::Isa isa : native::instruction_sets()) std::printf(" %s", native::name_of(isa));
    std::printf("\n");
    return native::tally.failures != 0 || native::tally.runs == 0;
  }
  std::fprintf(stderr, "usage: kernels FAMILY [--density=N] [--fault=NAME]; families:");
  for (const Family& family : kFamilies) std::fprintf(stderr, " %s", family.name);
  std::fprintf(stderr, "\n");
  return 2;
}
