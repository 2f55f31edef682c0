// The passes over pairs of tokens and slots for the gradients of a write with a number as erase
// (gated_write_backward.cu has the formulas, write_gradient_tiles.h the kernel).
#pragma once

#include "cuda/tiles/gate_fragments.h"

namespace mk::cuda {

enum class Of : int8_t {
  maps,     // the effect of 16 tokens on a slot, for all slots
  keys,     // dk and dmask
  query,    // dq
  deltas,   // sum_i a x of a token, for a softmax
  weights,  // da of given gates
  write,    // dw
};
constexpr int kBorder = 16;  // tokens between stored numbers

struct Gradients {
  Writing w;
  View d_out, retained, d_retained;  // given
  View d_values, d_keys, d_mask;     // by slots
  View d_query, d_write, d_weights;  // by tokens
  float *lefts, *shares;    // [batches][borders][N]: R after 16 tokens, p before them; before that, the maps of `maps`
  int* firsts;              // [batches][N]: the first 16 tokens with a suffix product above 0; none in a closed slot
  int64_t tokens, borders;  // per batch
  const float* deltas;      // [batches][tokens], of a softmax
};

// Run the passes. Each has a source of its own, since its kernels take long to compile.
void sum_by_slots(const Device&, const char* name, const Gradients&, Of);
void sum_by_tokens(const Device&, const char* name, const Gradients&, Of, float* deltas = nullptr);

}  // namespace mk::cuda
