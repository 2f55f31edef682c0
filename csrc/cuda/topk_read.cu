// topk_read:  p[t, j] = softmax_j(s[t, i_j]) over the k best slots i_j,   r_t = sum_j p[t, j] v_{i_j}
// backward:
//   dp[t, j] = <dr_t, v_{i_j}> + d_weights[t, j],   ds = p (dp - sum_j p dp + d_lse),
//   dv_i = sum_{i_j = i} p[t, j] dr_t
//
// The search writes weights instead of scores, then the chosen rows are gathered: k rows, little beside N keys. The
// backward needs only indices and weights and touches only chosen rows.
#include "cuda/tiles/chosen_rows.h"
#include "cuda/tiles/numbers.h"
#include "cuda/tiles/search_lists.h"
#include "params/topk_read.h"

namespace mk::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// ds = p (dp - sum p dp + d_lse), one warp per token. `ds` holds <dr, v> before, if there is a dr.
MK_KERNEL(kThreads) soften_gradient(MK_PARAM(TopkReadBackward) b, MK_PARAM(View) ds) {
  const Choice& c = b.search.choice;
  const int64_t at = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (at >= c.all_tokens()) return;
  const int64_t batch = at / c.tokens(), t = at % c.tokens();
  auto row = [&](const View& v) { return token_row(v, c.lead, v.batch(c.lead, batch), c.T, t); };
  const auto* index = reinterpret_cast<const int64_t*>(row(c.indices));
  const auto* w = reinterpret_cast<const float*>(row(b.weights));
  const auto* dw = b.d_weights ? reinterpret_cast<const float*>(row(b.d_weights)) : nullptr;
  auto* out = reinterpret_cast<float*>(row(ds));
  const int lane = int(threadIdx.x) & 31;
  auto dp = [&](int64_t j) { return (b.d_read ? out[j] : 0.f) + (dw != nullptr ? dw[j] : 0.f); };
  float mean = 0;
  for (int64_t j = lane; j < c.k; j += 32) mean += index[j] < 0 ? 0.f : w[j] * dp(j);
  mean = warp_sum(mean) - (b.d_lse ? load(row(b.d_lse), b.d_lse.dtype, 0) : 0.f);
  for (int64_t j = lane; j < c.k; j += 32) out[j] = index[j] < 0 ? 0.f : w[j] * (dp(j) - mean);
}

}  // namespace

void topk_read(const Device& device, const TopkRead& p) {
  const TopkSearch& s = p.search;
  search(device, "topk_read", s, p.weights, p.lse);
  gather_chosen(device, "topk_read", {{s.lead, s.T, s.k, s.N, s.indices}, p.V, p.values, p.weights, p.read, 1.f});
}

void read_gradients(const Device& device, const char* name, const TopkReadBackward& b) {
  const Choice& c = b.search.choice;
  const View ds = dense(device, c);
  if (b.d_read) multiply_chosen(device, name, {c, b.V, b.values, b.d_read, ds});
  launch(device, name, soften_gradient, div_up(c.all_tokens(), kWarps), kThreads, 0, b, ds);
  search_gradients(device, name, b.search, ds);
  // Without a gradient of the read, that of the values is zero: no tokens, no entries, all rows are cleared.
  ChosenSum values{c, b.V, b.d_values, b.d_read, b.weights, 1.f};
  if (!b.d_read) values.choice.T = 0;
  sum_chosen(device, name, values);
}

void topk_read_backward(const Device& device, const TopkReadBackward& b) {
  read_gradients(device, "topk_read_backward", b);
}

}  // namespace mk::cuda
