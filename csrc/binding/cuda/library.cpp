// What the CUDA library says of itself.
#include <string>

#include "binding/binding.h"

namespace {

// Why no kernel of this library can run here, or "". A driver runs every runtime of its own major version and of those before.
std::string why_not() {
#ifndef MK_SIMT
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no NVIDIA driver";
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) return "the CUDA runtime does not start";
  if (driver / 1000 < runtime / 1000) {
    return "the NVIDIA driver is too old: it runs CUDA " + std::to_string(driver / 1000) + ", the library needs CUDA " +
           std::to_string(runtime / 1000);
  }
#endif
  return "";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(memkernels_cuda, m) { m.def("why_not() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(memkernels_cuda, CompositeExplicitAutograd, m) { m.impl("why_not", TORCH_BOX(&why_not)); }
