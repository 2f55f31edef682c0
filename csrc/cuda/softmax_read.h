// The parts of softmax_read: few tokens by streams (softmax_read.cu), many by tiles on the tensor cores
// (softmax_read_tiles.cu, gradient_tiles.h).
#pragma once

#include "cpu/softmax_read.h"
#include "cuda/device.h"
#include "cuda/fragments.h"

namespace mk::cuda {

// Where ranges of slots meet when there are several: maxima m, sums l of exp(s - m), and sums of exp(s - m) v.
struct Ranges {
  int64_t splits = 1;
  int64_t split_rows = 0;    // slots per range
  int64_t rows = 0;          // tokens of all batches
  float* partial = nullptr;  // [splits][rows][V], then [splits][rows] of m, then of l; null: one range
};

// Adds up the ranges, in their order, and writes read and lse.
void merge_ranges(const Device&, const SoftmaxRead&, const Ranges&);

// Calls body<M, W>() for the arithmetic of the keys and the numbers of the values.
template <class Body>
auto with_types(const SoftmaxRead& p, bool tf32_allowed, Body&& body) {
  const bool same = p.V == 0 || p.values.dtype == p.keys.dtype;
  switch (p.keys.dtype) {
    case DType::f32:
      return tf32_allowed ? body.template operator()<tf32, float>() : body.template operator()<float, float>();
    case DType::bf16: return same ? body.template operator()<bf16, bf16>() : body.template operator()<bf16, float>();
    default: return same ? body.template operator()<f16, f16>() : body.template operator()<f16, float>();
  }
}

// Whether the tiles take the dtypes and widths of this call, on this device.
bool tiles_take(const Device&, const SoftmaxRead&);
void softmax_read_tiles(const Device&, const SoftmaxRead&);

// The same for gradients. terms: d_lse - <d_read, read>, one per token of all batches.
bool tiles_take(const Device&, const SoftmaxReadBackward&);
void softmax_read_tiles_backward(const Device&, const SoftmaxReadBackward&, const float* terms);

}  // namespace mk::cuda
