// What the operator library says of itself. The operators are defined by memkernels/registration.py; each csrc/<op>.cpp adds
// the kernels of one.
#include <string>

#include "binding.h"

namespace {

std::string isa_name() {
  switch (mk::isa()) {
    case mk::Isa::avx512bf16: return "avx512bf16";
    case mk::Isa::avx512: return "avx512";
    case mk::Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(memkernels_cpu, m) { m.def("isa() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(memkernels_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa_name)); }
