// Gradients of gated_write, erase a number e. With U = dv', R[t] = prod_{u > t} (1 - e a[u]), c[t, i] = <w_t, u_i> and the share of
// the result that was there before token t, seen through U, p_0 = <v_i, u_i>, p_t = (1 - e a[t]) p_{t-1} + a[t] c[t]:
//
//   dv = R[0] U,   dw_t = sum_i a R u_i,   ds[t, i] = R[t] (c[t] - e p_{t-1}) a (1 - a) - g_i retained_i a,   g = d retained
//   dq = scale ds k,   dk = scale ds^T q,   dmask_i = sum_t ds
//
// Gates that are given have da[t, i] = R[t] (c[t] - e p_{t-1}) in the place of ds. Those of a softmax have
//
//   x[t, i] = da[t, i] - g_i retained_i / (1 - a),   delta_t = sum_i a x,   ds = a (x - delta_t)
//
// What 16 tokens do to p is a map p -> k p + b, and k is what they leave of R. A first pass over all pairs finds the maps, in any
// order; the kernel here walks them, one thread per slot, and leaves R behind and p before the 16 tokens in their place:
// 2 N T / 16 numbers. Every tile is then known by itself, and each result is one more pass (write_gradient_tiles.h): no [T, N], one fixed
// order, nothing divided by 1 - a but what a softmax asks for. Tokens that leave no trace, because R is 0 behind them, are passed over.
#include "cuda/tiles/write_gradients.h"

namespace mk::cuda {
namespace {

constexpr int kSettled = 32,
              kAhead = 8;  // slots of a block; numbers that are read at a time, because each read takes long

struct Settled {
  float left[kSettled], share[kSettled];
  bool open[kSettled];
};

MK_KERNEL(kThreads) settle(MK_PARAM(Gradients) g, int64_t tiles) {
  Settled& block = *reinterpret_cast<Settled*>(shared_memory());
  const Pairs& p = g.w.pairs;
  const int tid = int(threadIdx.x), lane = tid % 32;
  const int64_t batch = blockIdx.x / tiles, first = blockIdx.x % tiles * kSettled, i = first + tid;
  const bool mine = tid < kSettled && i < p.N;
  float *lefts = g.lefts + batch * g.borders * p.N + i, *shares = g.shares + batch * g.borders * p.N + i;
  auto read = [&](const float* from, int64_t border, float(&x)[kAhead]) {
#pragma unroll
    for (int n = 0; n < kAhead; ++n) x[n] = border + n < g.borders ? from[(border + n) * p.N] : 1.f;
  };
  const int64_t last = round_up(g.borders, kAhead) - kAhead;
  int64_t traced = g.borders;  // the first 16 tokens that leave a trace
  if (mine) {
    const bool open = added_to(p, p.mask ? p.mask.batch(p.lead, batch) : nullptr, i) != -kInfinity;
    float left = 1, keep[kAhead];
    for (int64_t border = last; border >= 0; border -= kAhead) {
      read(lefts, border, keep);
#pragma unroll
      for (int n = kAhead; n-- > 0;) {
        if (border + n < g.borders && (left != 0 || !g.w.forgets())) traced = border + n;
        left *= keep[n];
      }
    }
    if (!open) traced = g.borders;
    g.firsts[batch * p.N + i] = int(traced);
    block.open[tid] = open, block.left[tid] = left;
  }
  __syncthreads();

  // A warp per slot: p_0 of the open ones, and dv of all.
  const char* values = p.values.batch(p.lead, batch);
  const char* upper = g.d_out.batch(p.lead, batch);
  char* d_values = g.d_values ? g.d_values.batch(p.lead, batch) : nullptr;
  for (int r = tid / 32; r < kSettled && first + r < p.N; r += kThreads / 32) {
    const int64_t i = first + r;
    float sum = 0;
    for (int64_t c = lane; c < p.V; c += 32) {
      const float u = load(upper + i * g.d_out.row, g.d_out.dtype, c);
      if (block.open[r]) sum += u * load(values + i * p.values.row, p.values.dtype, c);
      if (d_values != nullptr) reinterpret_cast<float*>(d_values + i * g.d_values.row)[c] = block.left[r] * u;
    }
    sum = warp_sum(sum);
    if (lane == 0) block.share[r] = sum;
  }
  __syncthreads();
  if (!mine) return;
  float share = block.share[tid], left = 1, keep[kAhead], add[kAhead];
  for (int64_t border = 0; border <= last; border += kAhead) {
    read(lefts, border, keep), read(shares, border, add);
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      if (border + n >= g.borders) continue;
      if (traced > 0 && border + n <= traced) share = 0;  // nothing of it is left (why: cpu/gated_write_backward.cpp)
      shares[(border + n) * p.N] = share;
      share = keep[n] * share + add[n];
    }
  }
  for (int64_t border = last; border >= 0; border -= kAhead) {
    read(lefts, border, keep);
#pragma unroll
    for (int n = kAhead; n-- > 0;) {
      if (border + n < g.borders) lefts[(border + n) * p.N] = left;
      left *= keep[n];
    }
  }
}

}  // namespace

void gated_write_backward(const Device& device, const GatedWriteBackward& b) {
  const GatedWrite& f = b.forward;
  const char* name = name_of(f);
  Gradients g{};
  g.w = writing_of(device, name, f);
  g.d_out = b.d_out, g.retained = f.retained, g.d_retained = b.d_retained;
  g.d_values = b.d_values, g.d_keys = b.d_keys, g.d_mask = b.d_mask;
  g.d_query = b.d_query, g.d_write = b.d_write, g.d_weights = b.d_weights;
  g.tokens = f.lead.folded() * f.T, g.borders = div_up(g.tokens, kBorder);
  const int64_t batches = f.lead.batches(), tiles = div_up(f.N, kSettled);
  g.lefts = device.scratch<float>(batches * g.borders * f.N),
  g.shares = device.scratch<float>(batches * g.borders * f.N);
  g.firsts = device.scratch<int>(batches * f.N);
  if (g.tokens > 0) sum_by_slots(device, name, g, Of::maps);
  launch(device, name, settle, batches * tiles, kThreads, sizeof(Settled), g, tiles);
  if (g.tokens == 0) return;
  if (g.w.softmax != nullptr) {
    auto* deltas = device.scratch<float>(batches * g.tokens);
    sum_by_tokens(device, name, g, Of::deltas, deltas);
    g.deltas = deltas;
  }
  if (g.d_query && f.K > 0) sum_by_tokens(device, name, g, Of::query);
  if (g.d_write && f.V > 0) sum_by_tokens(device, name, g, Of::write);
  if (g.d_weights) sum_by_tokens(device, name, g, Of::weights);
  if ((g.d_keys && f.K > 0) || g.d_mask) sum_by_slots(device, name, g, Of::keys);
}

}  // namespace mk::cuda
