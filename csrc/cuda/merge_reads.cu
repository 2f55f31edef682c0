// merge_reads:  lse_t = log sum_s exp(lse[s, t]),  w[s, t] = exp(lse[s, t] - lse_t),  r_t = sum_s w[s, t] r[s, t]
// backward:     d_r[s, t] = w[s, t] dr_t,  d_lse[s, t] = w[s, t] (<dr_t, r[s, t]> - sum_u w[u, t] <dr_t, r[u, t]> + d_lse_t)
//
// One warp per token, lanes along the value width: every read is loaded once, bound by bandwidth. A part of weight 0 is never
// looked at. The backward needs every product <dr_t, r[s, t]> twice and forms it twice, in the same order.
#include "cuda/tiles/device.h"
#include "cuda/tiles/numbers.h"
#include "params/merge_reads.h"

namespace mk::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// One warp's token, and its lse over the parts: base + log(sum).
struct Merging {
  const MergeReads& p;
  int64_t t;
  bool here;
  float base = 0, sum = 0;

  MK_DEVICE explicit Merging(const MergeReads& m) : p(m) {
    t = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    here = t < p.lead.folded() * p.T;
    if (!here) return;
    float top = -kInfinity;
    for (int64_t s = lane(); s < p.S; s += 32) top = fmaxf(top, lse(s));
    top = warp_max(top);
    base = isinf(top) ? 0.f : top;
    for (int64_t s = lane(); s < p.S; s += 32) sum += exponential(lse(s) - base);
    sum = warp_sum(sum);
  }
  MK_DEVICE static int lane() { return int(threadIdx.x) & 31; }
  // The row of part s of a tensor whose parts lie `part` bytes apart.
  MK_DEVICE char* row(const View& v, int64_t part, int64_t s) const {
    return token_row(v, p.lead, v.batch(p.lead, 0), p.T, t) + s * part;
  }
  MK_DEVICE float lse(int64_t s) const { return *reinterpret_cast<const float*>(row(p.lses, p.lses_part, s)); }
  MK_DEVICE float weight(int64_t s) const { return sum == 0 ? 0.f : exponential(lse(s) - base) / sum; }
};

MK_KERNEL(kThreads) merge(MK_PARAM(MergeReads) p) {
  const Merging m(p);
  if (!m.here) return;
  char* out = m.row(p.read, 0, 0);
  for (int64_t c = m.lane(); c < p.V; c += 32) {
    float x = 0;
    for (int64_t s = 0; s < p.S; ++s) {
      const float w = m.weight(s);
      if (w != 0) x += w * load(m.row(p.reads, p.reads_part, s), p.reads.dtype, c);
    }
    store(out, p.read.dtype, c, x);
  }
  if (m.lane() == 0) store(m.row(p.lse, 0, 0), DType::f32, 0, m.sum == 0 ? -kInfinity : m.base + logf(m.sum));
}

MK_KERNEL(kThreads) merge_gradient(MK_PARAM(MergeReadsBackward) b) {
  const MergeReads& p = b.forward;
  const Merging m(p);
  if (!m.here) return;
  const char* d_read = b.d_read ? m.row(b.d_read, 0, 0) : nullptr;
  auto product = [&](int64_t s, float w) {
    if (w == 0 || d_read == nullptr) return 0.f;  // the same for all lanes
    const char* row = m.row(p.reads, p.reads_part, s);
    float x = 0;
    for (int64_t c = m.lane(); c < p.V; c += 32) x += load(d_read, b.d_read.dtype, c) * load(row, p.reads.dtype, c);
    return warp_sum(x);
  };
  float mean = 0;
  for (int64_t s = 0; b.d_lses && s < p.S; ++s) {
    const float w = m.weight(s);
    mean += w == 0 ? 0.f : w * product(s, w);
  }
  const float d_lse = b.d_lse ? load(m.row(b.d_lse, 0, 0), DType::f32, 0) : 0.f;
  for (int64_t s = 0; s < p.S; ++s) {
    const float w = m.weight(s);
    if (b.d_lses) {
      const float x = product(s, w);
      if (m.lane() == 0) {
        store(m.row(b.d_lses, b.d_lses_part, s), b.d_lses.dtype, 0, w == 0 ? 0.f : w * (x - mean + d_lse));
      }
    }
    if (!b.d_reads) continue;
    char* out = m.row(b.d_reads, b.d_reads_part, s);
    for (int64_t c = m.lane(); c < p.V; c += 32) {
      store(out, b.d_reads.dtype, c, w == 0 || d_read == nullptr ? 0.f : w * load(d_read, b.d_read.dtype, c));
    }
  }
}

}  // namespace

void merge_reads(const Device& device, const MergeReads& p) {
  launch(device, "merge_reads", merge, div_up(p.lead.folded() * p.T, kWarps), kThreads, 0, p);
}

void merge_reads_backward(const Device& device, const MergeReadsBackward& b) {
  launch(device, "merge_reads_backward", merge_gradient, div_up(b.forward.lead.folded() * b.forward.T, kWarps),
         kThreads, 0, b);
}

}  // namespace mk::cuda
