// The passes over pairs of tokens and slots that make the gradients of a write with a number as erase (gated_write_backward.cu has the
// formulas, write_gradient_tiles.h the kernel).
#pragma once

#include "cuda/tiles/gate_fragments.h"

namespace mk::cuda {

enum class Of : int8_t {
  maps,     // what 16 tokens do to a slot, for all
  keys,     // dk and dmask
  query,    // dq
  deltas,   // sum_i a x of a token, for a softmax
  weights,  // da of gates that are given
  write,    // dw
};
constexpr int kBorder = 16;  // tokens between numbers that are kept

struct Gradients {
  Writing w;
  View d_out, retained, d_retained;  // given
  View d_values, d_keys, d_mask;     // by slots
  View d_query, d_write, d_weights;  // by tokens
  float *lefts, *shares;             // [batches][borders][N]: R behind 16 tokens, p before them; maps of `maps`
  int* firsts;                       // [batches][N]: of the first 16 tokens that leave a trace; none in a closed slot
  int64_t tokens, borders;           // of a batch
  const float* deltas;               // [batches][tokens], of a softmax
};

// Runs the passes; each in a source of its own, because they take long to compile.
void sum_by_slots(const Device&, const char* name, const Gradients&, Of);
void sum_by_tokens(const Device&, const char* name, const Gradients&, Of, float* deltas = nullptr);

}  // namespace mk::cuda
