// The gradients of softmax_read in tiles: which calls they take, and those in float32.
#include "cuda/tiles/softmax_read_tiles_backward.h"

namespace mk::cuda {

bool tiles_take(const Device& device, const SoftmaxReadBackward& b) {
  const SoftmaxRead& p = b.forward;
  const DType d = p.keys.dtype;
  const bool types = p.query.dtype == d && b.d_read.dtype == d && (p.values.dtype == d || p.values.dtype == DType::f32);
  // Tiles are as wide as their rows: the number of bytes must fit an int. A tile has two parts at least, and values are one.
  return types && p.V > 0 && p.K <= 1 << 20 && p.V <= 1 << 20 &&
         with_types(p, false, [&]<class M, class W>() {
           return most(lay_out<M, W, Of::query>(b).shared,
                       most(lay_out<M, W, Of::keys>(b).shared, lay_out<M, Stored<M>, Of::values>(b).shared));
         }) <= device.shared;
}

void softmax_read_tiles_backward(const Device& device, const SoftmaxReadBackward& b, const float* terms) {
  switch (b.forward.keys.dtype) {
    case DType::bf16: return sum_bf16(device, b, terms);
    case DType::f16: return sum_f16(device, b, terms);
    default:
      return device.allows_tf32(device.owner) ? sum_all<tf32, float>(device, b, terms)
                                              : sum_all<float, float>(device, b, terms);
  }
}

}  // namespace mk::cuda
