// selected_read:  s[t, j] = scale <q_t, k_i> + mask_i,  i = indices[t, j],  p = softmax_j(s),  r_t = sum_j p[t, j] v_i
//                 lse_t = log sum_j exp(s[t, j])
// backward:       that of topk_read with ds = p (dp - sum_j p dp + d_lse) (topk_read.cu)
//
// Bound by the bandwidth of scattered rows: a warp has a token, or where tokens are few a part of the slots that it
// names, and several rows in flight (cuda/tiles/row_packs.h). It goes through the keys, then through the values, whose
// accumulators so do not depend on a maximum that rises. Between the two the scores lie in the memory of the weights.
// Parts leave their maximum, sum and read in scratch memory, and a warp per token merges them in order.
//
// A slot that the mask empties counts as not named, whatever its rows hold.
#include "cuda/tiles/chosen_warps.h"
#include "cuda/tiles/search_lists.h"
#include "params/selected_read.h"

namespace mk::cuda {
namespace {

struct Reading {
  SelectedRead p;
  NamedParts parts;
  float* partial;  // [parts][tokens][V], then [parts][tokens] of the maximum, then of the sum; null: one part

  MK_DEVICE int64_t tokens() const { return p.choice.all_tokens(); }
  MK_DEVICE float* reads(int64_t part, int64_t token) const { return partial + (part * tokens() + token) * p.V; }
  MK_DEVICE float* top(int64_t part, int64_t token) const { return reads(parts.count, 0) + part * tokens() + token; }
  MK_DEVICE float* sum(int64_t part, int64_t token) const { return top(parts.count, token) + part * tokens(); }
};

// The slot that index names, -1 if the mask empties it. An index outside the memory stays what it is.
MK_DEVICE int64_t addressable(int64_t slot, int64_t slots, const View& mask, const char* base) {
  return slot >= 0 && slot < slots && mask_at(mask, base, slot) == -kInfinity ? -1 : slot;
}

// A weight from e = exp(s - top) and the sum of these. Beside an infinite score finite ones have weight 0.
MK_DEVICE float weight(float e, float top, float sum) { return sum == 0 || top == kInfinity ? e : e / sum; }

MK_DEVICE void store_results(const Reading& r, const Token& token, float top, float sum) {
  const float lse = top == kInfinity ? top : sum == 0 ? -kInfinity : top + logf(sum);
  if ((threadIdx.x & 31) == 0) store(token.row(r.p.lse, r.p.choice), DType::f32, 0, lse);
}

// Scores of the slots index[0, count), into kept; returns the largest, at least -inf.
template <class X, bool aligned>
MK_DEVICE float score_named(const SelectedRead& p, const Token& token, const int64_t* index, int64_t count,
                            float* kept) {
  const Choice& c = p.choice;
  const RowSource rows{p.keys.batch(c.lead, token.batch), p.keys.row, c.N, p.K};
  const char* mask = p.mask ? p.mask.batch(c.lead, token.batch) : nullptr;
  const char* query = token.row(p.query, c);
  const int G = lanes_per_row<X>(p.K), lane = int(threadIdx.x) & 31, groups = 32 / G;
  float top = -kInfinity;
  for (int64_t j0 = 0; j0 < count; j0 += groups) {
    const int64_t j = j0 + lane / G, slot = j < count ? addressable(index[j], c.N, p.mask, mask) : -1;
    const float x =
        multiply_row<X, aligned>(rows, slot, G, [&](int64_t column) { return load(query, p.query.dtype, column); });
    if (j >= count || lane % G != 0) continue;
    const bool inside = slot >= 0 && slot < c.N;
    kept[j] = scored(slot, c.N, inside ? score(float(p.scale), x, mask_at(p.mask, mask, slot)) : 0.f);
    top = fmaxf(top, kept[j]);
  }
  return warp_max(top);
}

template <class X, class W, bool aligned>
MK_KERNEL(kThreads)
read_named(MK_PARAM(Reading) r) {
  const SelectedRead& p = r.p;
  const Choice& c = p.choice;
  const Token token(c, r.parts.count);
  if (token.at >= c.all_tokens()) return;
  const int lane = int(threadIdx.x) & 31;
  const int64_t begin = token.part * r.parts.span, count = least(r.parts.span, c.k - begin);
  const auto* index = reinterpret_cast<const int64_t*>(token.row(c.indices, c)) + begin;
  auto* kept = reinterpret_cast<float*>(token.row(p.weights, c)) + begin;
  const float top = score_named<X, aligned>(p, token, index, count, kept);
  const float base = top == -kInfinity ? 0.f : top;
  __syncwarp();
  float sum = 0;
  for (int64_t j = lane; j < count; j += 32) sum += kept[j] = exponential(kept[j] - base);
  sum = warp_sum(sum);
  __syncwarp();
  const bool whole = r.partial == nullptr;
  const char* mask = p.mask ? p.mask.batch(c.lead, token.batch) : nullptr;
  const RowSource rows{p.values.batch(c.lead, token.batch), p.values.row, c.N, p.V};
  char* out = token.row(p.read, c);
  sum_rows<W, aligned>(
      rows, int(count), [&](int j) { return addressable(index[j], c.N, p.mask, mask); }, [&](int j) { return kept[j]; },
      [&](int64_t column, float x) {
        if (whole) store(out, p.read.dtype, column, weight(x, top, sum));
        else r.reads(token.part, token.at)[column] = x;
      });
  __syncwarp();
  if (whole) {
    for (int64_t j = lane; j < count; j += 32) kept[j] = weight(kept[j], top, sum);
    store_results(r, token, top, sum);
  } else if (lane == 0) {
    *r.top(token.part, token.at) = top, *r.sum(token.part, token.at) = sum;
  }
}

// A warp per token: merges its parts in order.
MK_KERNEL(kThreads) merge_parts(MK_PARAM(Reading) r) {
  const SelectedRead& p = r.p;
  const Choice& c = p.choice;
  const Token token(c);
  if (token.at >= c.all_tokens()) return;
  const int lane = int(threadIdx.x) & 31;
  float top = -kInfinity, sum = 0;
  for (int64_t i = 0; i < r.parts.count; ++i) top = fmaxf(top, *r.top(i, token.at));
  auto factor = [&](int64_t i) {
    const float own = *r.top(i, token.at);
    return own == top ? 1.f : exponential(own - top);
  };
  for (int64_t i = 0; i < r.parts.count; ++i) sum += factor(i) * *r.sum(i, token.at);
  char* out = token.row(p.read, c);
  for (int64_t column = lane; column < p.V; column += 32) {
    float x = 0;
    for (int64_t i = 0; i < r.parts.count; ++i) x += factor(i) * r.reads(i, token.at)[column];
    store(out, p.read.dtype, column, weight(x, top, sum));
  }
  auto* kept = reinterpret_cast<float*>(token.row(p.weights, c));
  for (int64_t j = lane; j < c.k; j += 32) kept[j] = weight(kept[j] * factor(j / r.parts.span), top, sum);
  store_results(r, token, top, sum);
}

// The indices, with -1 where the mask empties the slot.
MK_KERNEL(kThreads) name_addressable(MK_PARAM(Choice) c, MK_PARAM(View) mask, MK_PARAM(View) out) {
  const Token token(c);
  if (token.at >= c.all_tokens()) return;
  const auto* index = reinterpret_cast<const int64_t*>(token.row(c.indices, c));
  auto* to = reinterpret_cast<int64_t*>(token.row(out, c));
  const char* base = mask.batch(c.lead, token.batch);
  for (int64_t j = int(threadIdx.x) & 31; j < c.k; j += 32) to[j] = addressable(index[j], c.N, mask, base);
}

template <class X, class W>
void run(const Device& device, const Reading& r) {
  const SelectedRead& p = r.p;
  const Lead& lead = p.choice.lead;
  const int64_t blocks = div_up(p.choice.all_tokens() * r.parts.count, kWarps);
  const bool packs = in_packs(p.keys, lead, p.K) && in_packs(p.values, lead, p.V);
  launch(device, "selected_read", packs ? read_named<X, W, true> : read_named<X, W, false>, blocks, kThreads, 0, r);
}

}  // namespace

void selected_read(const Device& device, const SelectedRead& p) {
  const Choice& c = p.choice;
  if (p.values.dtype != p.keys.dtype && p.values.dtype != DType::f32) {
    throw std::runtime_error("selected_read: values must have the dtype of the keys, or float32");
  }
  Reading r{p, cut_named(device, c), nullptr};
  if (r.parts.count > 1) r.partial = device.scratch<float>(r.parts.count * c.all_tokens() * (p.V + 2));
  with_type(p.keys.dtype, [&]<class X>() {
    if (p.values.dtype == p.keys.dtype) run<X, X>(device, r);
    else run<X, float>(device, r);
  });
  if (r.partial) launch(device, "selected_read", merge_parts, div_up(c.all_tokens(), kWarps), kThreads, 0, r);
}

void selected_read_backward(const Device& device, const SelectedReadBackward& b) {
  const char* name = "selected_read_backward";
  TopkReadBackward read = b.read;
  Choice& c = read.search.choice;
  if (b.mask) {
    const View named = dense(device, c, DType::i64);
    launch(device, name, name_addressable, div_up(c.all_tokens(), kWarps), kThreads, 0, c, b.mask, named);
    c.indices = named;
  }
  read_gradients(device, name, read);
}

}  // namespace mk::cuda
