#include "cuda/tiles/softmax_read_tiles_backward.h"

namespace mk::cuda {

void sum_f16(const Device& device, const SoftmaxReadBackward& b, const float* terms) {
  sum_16_bits<f16>(device, b, terms);
}

}  // namespace mk::cuda
