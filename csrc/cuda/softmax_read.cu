// softmax_read:  s[t, i] = scale <q_t, k_i> + mask_i,   r_t = sum_i softmax_i(s[t, i]) v_i,   lse_t = log sum_i exp(s[t, i])
//
// Bound by the bandwidth of keys and values as long as tokens are few. A block has Q tokens, a range of slots and up to 256 value
// columns; ranges fill the chip (cuda/tiles/stream.h has the pipeline). Per tile of S slots: scores into shared memory; one warp per
// token raises its maximum m, turns scores into p = exp(s - m) and adds them to l; then each thread owns two value columns and adds
// p v for all Q tokens, in registers, rescaled by exp(m_old - m). Narrow values: several groups of threads take every g-th slot and
// are added up at the end, in order.
//
// A range ends with (m, l, acc). One range: divided and written. Several: they meet in scratch memory, and a second kernel merges
// them in the order of the ranges, so that the same shapes on the same device give the same bits.
#include "cuda/tiles/device.h"
#include "cuda/tiles/read_ranges.h"
#include "cuda/tiles/stream_plan.h"
#include "params/softmax_read.h"

namespace mk::cuda {
namespace {

constexpr int kColumns = 256;  // value columns of a block

struct Reading {
  SoftmaxRead p;
  StreamPlan plan;
  Ranges ranges;
  int value_blocks;
  int width;  // value columns of a block but the last
};

// Finds out what a token's tile does to its softmax: p = exp(s - m), and `fade` for what was added up before.
template <int Q>
MK_DEVICE void soften(float* scores, int S, float* m, float* l, float* fade) {
  const int lane = int(threadIdx.x) & 31;
  for (int q = int(threadIdx.x) / 32; q < Q; q += kThreads / 32) {
    float* s = scores + q * S;
    float top = -kInfinity;
    for (int i = lane; i < S; i += 32) top = fmaxf(top, s[i]);
    const float was = m[q], now = fmaxf(was, warp_max(top));
    const float base = isinf(now) ? 0.f : now;  // nothing addressable yet; a NaN or +inf shows in the sum
    float sum = 0;
    for (int i = lane; i < S; i += 32) sum += s[i] = exponential(s[i] - base);
    sum = warp_sum(sum);
    const float f = was == now ? 1.f : exponential(was - base);
    __syncwarp();
    if (lane == 0) m[q] = now, l[q] = l[q] * f + sum, fade[q] = f;
  }
}

template <class X, class W, int Q>
MK_KERNEL(kThreads)
read_stream(MK_PARAM(Reading) r) {
  const SoftmaxRead& p = r.p;
  const StreamPlan& plan = r.plan;
  const int S = plan.slots, tid = int(threadIdx.x);
  int64_t at = blockIdx.x;
  const int64_t split = at % plan.splits;
  at /= plan.splits;
  const int value_block = int(at % r.value_blocks);
  at /= r.value_blocks;
  const int64_t t0 = at % plan.tiles * Q, batch = at / plan.tiles, tokens = p.lead.folded() * p.T;
  const int64_t begin = split * plan.split_rows, end = least(p.N, begin + plan.split_rows);
  const int64_t column0 = int64_t(value_block) * r.width;
  const int columns = int(least(r.width, p.V - column0));

  char* buffers = shared_memory();
  auto* query = reinterpret_cast<float*>(buffers + kStages * plan.stage_bytes);
  float* scores = query + Q * plan.padded;
  float *m = scores + Q * S, *l = m + Q, *fade = l + Q;
  if (tid < Q) m[tid] = -kInfinity, l[tid] = 0;
  load_queries<Q>(p.query, p.lead, batch, p.T, t0, tokens, p.K, plan.padded, query);

  const char* keys = p.keys.batch(p.lead, batch);
  const char* values = columns > 0 ? p.values.batch(p.lead, batch) + column0 * int64_t(sizeof(W)) : nullptr;
  const char* mask = p.mask ? p.mask.batch(p.lead, batch) : nullptr;
  const int parts = plan.key_parts + (columns > 0 ? 1 : 0);
  auto key_columns = [&](int part) { return int(least(kPart, p.K - part * kPart)); };
  auto ask = [&](const Step& step) {
    if (step.first < end) {
      char* buffer = buffers + step.buffer * plan.stage_bytes;
      if (step.part < plan.key_parts) {
        fetch<X>({keys + step.part * kPart * int64_t(sizeof(X)), p.keys.row, step.first, end, key_columns(step.part),
                  plan.key_packs},
                 S, p.mask, mask, buffer);
      } else {
        fetch<W>({values, p.values.row, step.first, end, columns, plan.value_packs}, S, p.mask, mask, buffer);
      }
    }
    commit_copies();
  };
  Step ahead{begin};
  for (int i = 0; i < kStages - 1; ++i, ahead.next(parts, S)) ask(ahead);

  // A pair of value columns per thread; `groups` threads share a pair and take every groups-th slot.
  int pairs = 1;
  while (2 * pairs < columns) pairs *= 2;
  const int pair = tid % pairs, group = tid / pairs, groups = kThreads / pairs;
  float acc[Q][2] = {}, s[Q] = {};
  for (Step step{begin}; step.first < end; step.next(parts, S)) {
    wait_copies<kStages - 2>();
    __syncthreads();  // the part is there for all threads, and the buffer asked for below is free
    ask(ahead);
    ahead.next(parts, S);
    const char* buffer = buffers + step.buffer * plan.stage_bytes;
    if (step.part < plan.key_parts) {
      multiply<X, Q>(buffer, key_columns(step.part), query + step.part * kPart, plan.padded, S, s);
      if (step.part + 1 < plan.key_parts) continue;
      store_scores<Q>(s, float(p.scale), S, step.first, end, p.mask, mask, scores);
      __syncthreads();
      soften<Q>(scores, S, m, l, fade);
      continue;
    }
    float part[Q][2] = {};  // of this tile: a long sum is one of sums
    if (2 * pair >= columns) continue;
    for (int i = group; i < S; i += groups) {
      const auto* row = reinterpret_cast<const W*>(buffer + i * pitch_of<W>(columns)) + 2 * pair;
      const float v0 = to_float(row[0]), v1 = to_float(row[1]);
#pragma unroll
      for (int q = 0; q < Q; ++q) part[q][0] += scores[q * S + i] * v0, part[q][1] += scores[q * S + i] * v1;
    }
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      acc[q][0] = acc[q][0] * fade[q] + part[q][0], acc[q][1] = acc[q][1] * fade[q] + part[q][1];
    }
  }

  wait_copies<0>();
  __syncthreads();
  auto* sums = reinterpret_cast<float*>(buffers);  // [groups][Q][2 pairs]
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    sums[((group * Q + q) * pairs + pair) * 2] = acc[q][0];
    sums[((group * Q + q) * pairs + pair) * 2 + 1] = acc[q][1];
  }
  __syncthreads();
  for (int q = 0; q < Q && t0 + q < tokens; ++q) {
    const int64_t token = batch * tokens + t0 + q, rows = r.ranges.rows;
    const float inverse = l[q] == 0 ? 0.f : 1.f / l[q];
    float* part = r.ranges.partial == nullptr ? nullptr : r.ranges.partial + (split * rows + token) * p.V + column0;
    char* out =
        part != nullptr || columns == 0 ? nullptr : token_row(p.read, p.lead, p.read.batch(p.lead, batch), p.T, t0 + q);
    for (int c = tid; c < columns; c += kThreads) {
      float sum = 0;
      for (int g = 0; g < groups; ++g) sum += sums[(g * Q + q) * pairs * 2 + c];
      if (part != nullptr) part[c] = sum;
      else store(out, p.read.dtype, column0 + c, l[q] == 0 ? 0.f : sum * inverse);
    }
    if (value_block != 0 || tid != 0) continue;
    if (part != nullptr) {
      float* ends = r.ranges.partial + plan.splits * rows * p.V;
      ends[split * rows + token] = m[q];
      ends[(plan.splits + split) * rows + token] = l[q];
    } else {
      store_lse(p, batch, t0 + q, m[q], l[q]);
    }
  }
}

// One block per token: adds up the ranges.
MK_KERNEL(kThreads) add_ranges(MK_PARAM(SoftmaxRead) p, MK_PARAM(Ranges) r) {
  const int64_t token = blockIdx.x, tokens = p.lead.folded() * p.T, splits = r.splits;
  const int64_t batch = token / tokens, t = token % tokens;
  const float *m = r.partial + splits * r.rows * p.V + token, *l = m + splits * r.rows;
  auto* w = reinterpret_cast<float*>(shared_memory());
  float top = -kInfinity, sum = 0;
  for (int64_t i = 0; i < splits; ++i) top = fmaxf(top, m[i * r.rows]);
  const float base = isinf(top) ? 0.f : top;
  for (int64_t i = 0; i < splits; ++i) {
    const float own = m[i * r.rows], f = exponential((isinf(own) ? 0.f : own) - base);
    const float weight = l[i * r.rows] == 0 ? 0.f : f;
    sum += weight == 0 ? 0.f : weight * l[i * r.rows];
    if (threadIdx.x == 0) w[i] = weight;
  }
  __syncthreads();
  char* out = p.V == 0 ? nullptr : token_row(p.read, p.lead, p.read.batch(p.lead, batch), p.T, t);
  for (int64_t c = threadIdx.x; c < p.V; c += kThreads) {
    const float* part = r.partial + token * p.V + c;
    float x = 0;
    for (int64_t i = 0; i < splits; ++i) x += w[i] == 0 ? 0.f : w[i] * part[i * r.rows * p.V];
    store(out, p.read.dtype, c, sum == 0 ? 0.f : x / sum);
  }
  if (threadIdx.x == 0) store_lse(p, batch, t, top, sum);
}

template <class X, class W, int Q>
void read(const Device& device, Reading r) {
  const SoftmaxRead& p = r.p;
  r.value_blocks = int(most(1, div_up(p.V, kColumns)));
  r.width = int(round_up(div_up(p.V, r.value_blocks), 8));
  r.plan =
      plan_stream(device, {p.lead, p.T, p.N, p.K, p.keys, least(r.width, p.V), int64_t(sizeof(W)), r.value_blocks, Q});
  r.plan.value_packs = p.V > 0 && in_packs(p.values, p.lead, p.V) && r.width * sizeof(W) % 16 == 0;
  r.ranges = {r.plan.splits, r.plan.split_rows, p.lead.batches() * p.lead.folded() * p.T, nullptr};
  if (r.plan.splits > 1) r.ranges.partial = device.scratch<float>(r.plan.splits * r.ranges.rows * (p.V + 2));
  // At the end the buffers hold a pair of sums per thread and token.
  r.plan.stage_bytes = int(most(r.plan.stage_bytes, round_up(div_up(kThreads * Q * 8, kStages), 16)));
  const int64_t shared = kStages * r.plan.stage_bytes + (Q * r.plan.padded + Q * r.plan.slots + 3 * Q) * 4;
  launch(device, "softmax_read", read_stream<X, W, Q>, p.lead.batches() * r.plan.tiles * r.value_blocks * r.plan.splits,
         kThreads, shared, r);
  if (r.plan.splits > 1) merge_ranges(device, p, r.ranges);
}

}  // namespace

void merge_ranges(const Device& device, const SoftmaxRead& p, const Ranges& r) {
  launch(device, "softmax_read", add_ranges, r.rows, kThreads, r.splits * 4, p, r);
}

void softmax_read(const Device& device, const SoftmaxRead& p) {
  if (p.V > 0 && p.values.dtype != p.keys.dtype && p.values.dtype != DType::f32) {
    throw std::runtime_error("softmax_read: values must have the dtype of the keys, or float32");
  }
  if (p.lead.folded() * p.T > kFew && tiles_take(device, p)) return softmax_read_tiles(device, p);
  const Reading r{p, {}, {}, 0, 0};
  with_queries(queries_at_once(p.lead.folded() * p.T, p.K), [&]<int Q>() {
    with_type(p.keys.dtype, [&]<class X>() {
      if (p.V > 0 && p.values.dtype != p.keys.dtype) read<X, float, Q>(device, r);
      else read<X, X, Q>(device, r);
    });
  });
}

}  // namespace mk::cuda
