// The operator library's report on itself and on the processor. memkernels/registration.py defines the operators; each
// csrc/binding/<op>.cpp registers the kernels of one.
#include <string>

#include "binding/binding.h"
#include "host/processor.h"

namespace {

std::string isa_name() {
  switch (mk::isa()) {
    case mk::Isa::avx512bf16: return "avx512bf16";
    case mk::Isa::avx512: return "avx512";
    case mk::Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

// One fact per line, its name first: name, cores, l1d, l2, l3, line, features.
std::string processor() {
  using namespace memkernels::host;
  std::string text = "name " + processor_name() + "\ncores " + std::to_string(usable_cores().size());
  for (const auto& [name, bytes] : caches()) text += "\n" + name + " " + std::to_string(bytes);
  text += "\nfeatures";
  for (const auto& [name, usable] : features()) text += usable ? " " + name : "";
  return text;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(memkernels_cpu, m) {
  m.def("isa() -> str");
  m.def("processor() -> str");
  m.def("fill_new_memory(bool on) -> int");
  m.def(
      "slot_places(Tensor slots, Tensor live, int capacity, Tensor frame_of, int page_slots, Tensor(a!) count, "
      "bool none) -> Tensor");
  m.def("gather_rows_out(Tensor values, Tensor indices, Tensor? value_scale, int block, Tensor(a!) out) -> ()");
  m.def(
      "sparse_adam(Tensor(a!) values, Tensor(b!) first, Tensor(c!) second, Tensor slots, Tensor gradient, "
      "float step_size, float beta1, float beta2, float eps) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(memkernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa_name));
  m.impl("processor", TORCH_BOX(&processor));
  m.impl("fill_new_memory", TORCH_BOX(&mk::fill_new_memory));
}
