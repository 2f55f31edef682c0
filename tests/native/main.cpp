// kernels <family> [--density=N] [--fault=NAME]: every N-th case of the grid for one family of kernels; exit status 1
// if one fails.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "kernels.h"

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  int density = 1;
  for (int i = 2; i < argc; ++i) {
    const std::string option = argv[i];
    if (option.starts_with("--density=")) density = std::atoi(option.c_str() + 10);
    else if (option.starts_with("--fault=")) native::fault = option.substr(8);
    else return std::fprintf(stderr, "unknown option %s\n", argv[i]), 2;
  }
  if (const auto family = native::families().find(wanted); family != native::families().end()) {
    int64_t cases = 0;
    native::each_case(density, [&](const native::Case& c) { family->second(c), ++cases; });
    std::printf("%s: %lld cases, %lld runs compared, %lld failures; instruction sets:", wanted.c_str(),
                (long long)cases, (long long)native::tally.runs, (long long)native::tally.failures);
    for (mk::Isa isa : native::instruction_sets()) std::printf(" %s", native::name_of(isa));
    std::printf("\n");
    return native::tally.failures != 0 || native::tally.runs == 0;
  }
  std::fprintf(stderr, "usage: kernels FAMILY [--density=N] [--fault=NAME]; families:");
  for (const auto& [name, test] : native::families()) std::fprintf(stderr, " %s", name.c_str());
  std::fprintf(stderr, "\n");
  return 2;
}
