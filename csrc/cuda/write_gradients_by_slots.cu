#include "cuda/tiles/write_gradient_passes.h"

namespace mk::cuda {

void sum_by_slots(const Device& device, const char* name, const Gradients& g, Of of) {
  sum_by<true>(device, name, g, of, nullptr);
}

}  // namespace mk::cuda
