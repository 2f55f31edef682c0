// The parts of softmax_read: few tokens by streams (softmax_read.cu), many by tiles on the tensor cores
// (softmax_read_tiles.cu, gradient_tiles.h).
#pragma once

#include "cuda/tiles/device.h"
#include "cuda/tiles/fragments.h"
#include "params/softmax_read.h"

namespace mk::cuda {

// Where ranges of slots meet when there are several: maxima m, sums l of exp(s - m), and sums of exp(s - m) v.
struct Ranges {
  int64_t splits = 1;
  int64_t split_rows = 0;    // slots per range
  int64_t rows = 0;          // tokens of all batches
  float* partial = nullptr;  // [splits][rows][V], then [splits][rows] of m, then of l; null: one range
};

// Writes the statistics of token t: lse = log(l) + m, and what its rounding left out; -inf and 0 where no slot is open. For sums of
// exp(s - m), where an infinite m counts as 0.
MK_DEVICE void store_lse(const SoftmaxRead& p, int64_t batch, int64_t t, float m, float l) {
  const float top = isinf(m) ? 0.f : m, log_sum = logf(l), lse = l == 0 ? -kInfinity : top + log_sum;
  auto put = [&](const View& v, float x) {
    store(token_row(v, p.lead, v.batch(p.lead, batch), p.T, t), DType::f32, 0, x);
  };
  put(p.lse, lse), put(p.lse_rest, isinf(lse) ? 0.f : (top - lse) + log_sum);
}

// Adds up the ranges, in their order, and writes read, lse and lse_rest.
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
