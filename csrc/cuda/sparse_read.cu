// sparse_read:  r_t = sum_j w[t, j] v_{i[t, j]};   backward: dw[t, j] = <dr_t, v_{i[t, j]}>,  dv_i = sum_{i[t, j] = i} w[t, j] dr_t
//
// Bound by bandwidth of scattered rows: a warp per token, 16 bytes per lane, several rows under way (cuda/gather.h). The gradient
// of the values is summed row by row in the order of the tokens (cuda/segments.cu).
#include "cuda/gather.h"
#include "cuda/launchers.h"
#include "cuda/segments.h"
#include "cuda/stream.h"

namespace mk::cuda {
namespace {

constexpr int kWarps = kThreads / 32;

// One warp's token.
struct Token {
  int64_t at, batch, t;
  MK_DEVICE explicit Token(const Choice& c) {
    at = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    batch = at / most(c.tokens(), 1), t = at % most(c.tokens(), 1);
  }
  MK_DEVICE char* row(const View& v, const Choice& c) const {
    return token_row(v, c.lead, v.batch(c.lead, batch), c.T, t);
  }
};

template <class X, int E>
MK_KERNEL(kThreads) gather_rows(MK_PARAM(SparseRead) p) {
  const Choice& c = p.choice;
  const Token token(c);
  if (token.at >= c.all_tokens()) return;
  const auto* index = reinterpret_cast<const int64_t*>(token.row(c.indices, c));
  const char* weights = token.row(p.weights, c);
  char* out = token.row(p.read, c);
  const RowSource rows{p.values.batch(c.lead, token.batch), p.values.row, c.N, p.V, E > 1};
  sum_rows<X, E>(
      rows, int(c.k), [&](int j) { return index[j]; }, [&](int j) { return load(weights, p.weights.dtype, j); },
      [&](int64_t column, float x) { store(out, p.read.dtype, column, x); });
}

template <class X, int E>
MK_KERNEL(kThreads) multiply_chosen(MK_PARAM(SparseReadBackward) b) {
  const SparseRead& p = b.forward;
  const Choice& c = p.choice;
  const Token token(c);
  if (token.at >= c.all_tokens()) return;
  const auto* index = reinterpret_cast<const int64_t*>(token.row(c.indices, c));
  const char* d_read = token.row(b.d_read, c);
  char* out = token.row(b.d_weights, c);
  const RowSource rows{p.values.batch(c.lead, token.batch), p.values.row, c.N, p.V, E > 1};
  const int G = lanes_per_row(p.V / E), lane = int(threadIdx.x) & 31, group = lane / G, groups = 32 / G;
  for (int j0 = 0; j0 < c.k; j0 += groups) {
    const int j = j0 + group;
    const int64_t row = j < c.k ? index[j] : -1;
    const float x =
        multiply_row<X, E>(rows, row, G, [&](int64_t column) { return load(d_read, b.d_read.dtype, column); });
    if (j < c.k && lane % G == 0) store(out, b.d_weights.dtype, j, x);
  }
}

// Calls body<X, E>(): the type of the rows, and how many numbers are loaded at once.
template <class Body>
void with_rows(const View& rows, const Lead& lead, int64_t width, Body&& body) {
  const bool packs = in_packs(rows, lead, width);
  with_type(rows.dtype, [&]<class X>() {
    if (packs) body.template operator()<X, Pack<X>::size>();
    else body.template operator()<X, 1>();
  });
}

}  // namespace

void sparse_read(const Device& device, const SparseRead& p) {
  with_rows(p.values, p.choice.lead, p.V, [&]<class X, int E>() {
    launch(device, "sparse_read", gather_rows<X, E>, div_up(p.choice.all_tokens(), kWarps), kThreads, 0, p);
  });
}

void sparse_read_backward(const Device& device, const SparseReadBackward& b) {
  const SparseRead& p = b.forward;
  const char* name = "sparse_read_backward";
  if (b.d_weights) {
    with_rows(p.values, p.choice.lead, p.V, [&]<class X, int E>() {
      launch(device, name, multiply_chosen<X, E>, div_up(p.choice.all_tokens(), kWarps), kThreads, 0, b);
    });
  }
  sum_chosen(device, name, p.choice, {b.d_values, p.V, b.d_read, p.weights, nullptr, 1.f});
}

}  // namespace mk::cuda
