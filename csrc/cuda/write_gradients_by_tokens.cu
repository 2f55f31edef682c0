#include "cuda/tiles/write_gradient_passes.h"

namespace mk::cuda {

void sum_by_tokens(const Device& device, const char* name, const Gradients& g, Of of, float* deltas) {
  sum_by<false>(device, name, g, of, deltas);
}

}  // namespace mk::cuda
