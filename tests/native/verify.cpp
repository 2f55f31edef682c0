// Checks a kernel for any number of threads.
#include <cstdio>

#include "grid.h"

namespace native {

void verify(const Case& c, const char* entry, std::initializer_list<Result> results,
            const std::function<void()>& call) {
  for (mk::Isa isa : instruction_sets()) {
    auto wrong = [&](const char* output, const std::string& what) {
      std::printf("FAIL %s %s, %s: %s: %s\n", entry, native::name_of(isa), c.text().c_str(), output, what.c_str());
      ++tally.failures;
    };
    std::vector<std::string> bytes;
    for (int threads : {1, 4}) {
      for (const Result& r : results) r.got->poison();
      use(isa, threads);
      call();
      if (fault == "value") results.begin()->got->break_one();
      ++tally.runs;
      size_t i = 0;
      for (const Result& r : results) {
        if (!*r.got) continue;
        if (threads == 1) {
          const std::string what = difference(*r.got, *r.want, tolerance(c, entry, isa, r));
          if (!what.empty()) wrong(r.name, what);
          bytes.push_back(r.got->bytes());
        } else if (bytes[i++] != r.got->bytes()) {
          wrong(r.name, "one thread and four give different bits");
        }
      }
    }
  }
}

}  // namespace native
