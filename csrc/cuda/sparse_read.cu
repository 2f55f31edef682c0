// sparse_read:  r_t = sum_j w[t, j] v_{i[t, j]}
// backward:     dw[t, j] = <dr_t, v_{i[t, j]}>,  dv_i = sum_{i[t, j] = i} w[t, j] dr_t
//
// Bound by the bandwidth of scattered rows: one warp per token, 16 bytes per lane, several rows in flight
// (cuda/tiles/row_packs.h). The gradient of the values is summed row by row in the order of the tokens
// (cuda/segments.cu).
#include "cuda/tiles/chosen_warps.h"
#include "params/sparse_read.h"

namespace mk::cuda {
namespace {

template <class X, bool aligned>
MK_KERNEL(kThreads)
gather_rows(MK_PARAM(Gather) g) {
  const Choice& c = g.choice;
  const Token token(c);
  if (token.at >= c.all_tokens()) return;
  const auto* index = reinterpret_cast<const int64_t*>(token.row(c.indices, c));
  const char* weights = token.row(g.weights, c);
  char* out = token.row(g.out, c);
  const RowSource rows{g.rows.batch(c.lead, token.batch), g.rows.row, c.N, g.width};
  sum_rows<X, aligned>(
      rows, int(c.k), [&](int j) { return index[j]; }, [&](int j) { return load(weights, g.weights.dtype, j); },
      [&](int64_t column, float x) { store(out, g.out.dtype, column, g.factor * x); });
}

template <class X, bool aligned>
MK_KERNEL(kThreads)
multiply_rows(MK_PARAM(Products) p) {
  const Choice& c = p.choice;
  const Token token(c);
  if (token.at >= c.all_tokens()) return;
  const auto* index = reinterpret_cast<const int64_t*>(token.row(c.indices, c));
  const char* own = token.row(p.tokens, c);
  char* out = token.row(p.out, c);
  const RowSource rows{p.rows.batch(c.lead, token.batch), p.rows.row, c.N, p.width};
  const int G = lanes_per_row<X>(p.width), lane = int(threadIdx.x) & 31, group = lane / G, groups = 32 / G;
  for (int j0 = 0; j0 < c.k; j0 += groups) {
    const int j = j0 + group;
    const int64_t row = j < c.k ? index[j] : -1;
    const float x =
        multiply_row<X, aligned>(rows, row, G, [&](int64_t column) { return load(own, p.tokens.dtype, column); });
    if (j < c.k && lane % G == 0) store(out, p.out.dtype, j, x);
  }
}

}  // namespace

void gather_chosen(const Device& device, const char* name, const Gather& g) {
  with_rows(g.rows, g.choice.lead, g.width, [&]<class X, bool aligned>() {
    launch(device, name, gather_rows<X, aligned>, div_up(g.choice.all_tokens(), kWarps), kThreads, 0, g);
  });
}

void multiply_chosen(const Device& device, const char* name, const Products& p) {
  with_rows(p.rows, p.choice.lead, p.width, [&]<class X, bool aligned>() {
    launch(device, name, multiply_rows<X, aligned>, div_up(p.choice.all_tokens(), kWarps), kThreads, 0, p);
  });
}

int64_t sparse_read(const Device& device, const SparseRead& p) {
  gather_chosen(device, "sparse_read", {p.choice, p.V, p.values, p.weights, p.read, 1.f});
  return -1;  // the host does not wait for the kernel, which checks each index before it reads a row
}

void sparse_read_backward(const Device& device, const SparseReadBackward& b) {
  const SparseRead& p = b.forward;
  const char* name = "sparse_read_backward";
  if (b.d_weights) multiply_chosen(device, name, {p.choice, p.V, p.values, b.d_read, b.d_weights});
  sum_chosen(device, name, {p.choice, p.V, b.d_values, b.d_read, p.weights, 1.f});
}

}  // namespace mk::cuda
