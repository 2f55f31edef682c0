// softmax_read:  s[t, i] = scale <q_t, k_i> + mask_i,  r_t = sum_i softmax_i(s[t, i]) v_i,
//                lse_t = log sum_i exp(s[t, i])
//
// Bound by the bandwidth of keys and values if tokens are few. A block has Q tokens, a range of slots and up to 256
// value columns; there are enough ranges to fill the GPU (cuda/tiles/stream.h describes the pipeline). Per tile of S
// slots the scores go to shared memory. One warp per token updates its maximum m, turns scores into p = exp(s - m) and
// adds them to l. Then each thread owns two value columns and adds p v for all Q tokens in registers, rescaled by
// exp(m_old - m). If values are narrow, several groups of threads take every g-th slot, and their sums are added in
// order at the end. Where tokens have ranges of slots, a block leaves out the slots that none of its tokens may
// address.
//
// A range ends with (m, l, acc). If there is one range, it divides and writes the read. If there are several, they
// write to scratch memory, and a second kernel merges them in order, so the same shapes on the same device give the
// same bits.
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
  int width;  // value columns of every block but the last
};

// Updates the softmax of each token by a tile: p = exp(s - m), and `fade`, the factor for earlier sums.
template <int Q>
MK_DEVICE void soften(float* scores, int S, float* m, float* l, float* fade) {
  const int lane = int(threadIdx.x) & 31;
  for (int q = int(threadIdx.x) / 32; q < Q; q += kThreads / 32) {
    float* s = scores + q * S;
    float top = -kInfinity;
    for (int i = lane; i < S; i += 32) top = fmaxf(top, s[i]);
    const float was = m[q], now = fmaxf(was, warp_max(top));
    const float base = isinf(now) ? 0.f : now;  // nothing addressable yet; a NaN or +inf reaches the sum
    float sum = 0;
    for (int i = lane; i < S; i += 32) sum += s[i] = exponential(s[i] - base);
    sum = warp_sum(sum);
    const float f = was == now ? 1.f : exponential(was - base);
    __syncwarp();
    if (lane == 0) m[q] = now, l[q] = l[q] * f + sum, fade[q] = f;
  }
}

// A block's position in the call.
struct Position {
  int64_t split, batch, t0, tokens;  // the range of slots; the first token, of `tokens` of the batch
  int64_t begin, end;                // the range: slots [begin, end)
  int64_t column0;                   // the first value column
  int value_block, columns;
};
template <int Q>
MK_DEVICE Position locate(const Reading& r) {
  const SoftmaxRead& p = r.p;
  const StreamPlan& plan = r.plan;
  int64_t at = blockIdx.x;
  const int64_t split = at % plan.splits;
  at /= plan.splits;
  const int value_block = int(at % r.value_blocks);
  at /= r.value_blocks;
  const int64_t t0 = at % plan.tiles * Q, batch = at / plan.tiles;
  const int64_t begin = split * plan.split_rows, end = least(p.N, begin + plan.split_rows);
  const int64_t column0 = int64_t(value_block) * r.width;
  return {
      split, batch, t0, p.lead.folded() * p.T, begin, end, column0, value_block, int(least(r.width, p.V - column0))};
}

// Loads the rows of a range tile by tile: the parts of the keys of a tile, then its values. Two parts are in flight.
template <class X, class W>
struct Loader {
  const Reading& r;
  const Position& at;
  char* buffers;
  Step ahead{at.begin};  // the part to load next
  const char* keys = r.p.keys.batch(r.p.lead, at.batch);
  const char* values = at.columns > 0 ? r.p.values.batch(r.p.lead, at.batch) + at.column0* int64_t(sizeof(W)) : nullptr;
  const char* mask = r.p.mask ? r.p.mask.batch(r.p.lead, at.batch) : nullptr;
  int parts = r.plan.key_parts + (at.columns > 0 ? 1 : 0);

  MK_DEVICE int key_columns(int part) const { return int(least(kPart, r.p.K - part * kPart)); }

  // Starts the copy of the next part, keys [S, 256] or values [S, columns]; none past the range.
  MK_DEVICE void prefetch() {
    const SoftmaxRead& p = r.p;
    const StreamPlan& plan = r.plan;
    if (ahead.first < at.end) {
      char* buffer = buffers + ahead.buffer * plan.stage_bytes;
      if (ahead.part < plan.key_parts) {
        fetch<X>({keys + ahead.part * kPart * int64_t(sizeof(X)), p.keys.row, ahead.first, at.end,
                  key_columns(ahead.part), plan.key_packs},
                 plan.slots, p.mask, mask, buffer);
      } else {
        fetch<W>({values, p.values.row, ahead.first, at.end, at.columns, plan.value_packs}, plan.slots, p.mask, mask,
                 buffer);
      }
    }
    commit_copies();
    ahead.next(parts, plan.slots);
  }

  // Waits for the part at `step`, and prefetches the next one. No thread uses the buffer of the part before.
  MK_DEVICE const char* arrived(const Step& step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    prefetch();
    return buffers + step.buffer * r.plan.stage_bytes;
  }
};

// The sums over slots of p v. A thread has a pair of value columns; `groups` threads share a pair and take every
// groups-th slot.
template <int Q>
struct Columns {
  int columns;
  int pairs, pair, group, groups;
  float acc[Q][2] = {};

  MK_DEVICE explicit Columns(int columns) : columns(columns), pairs(1) {
    while (2 * pairs < columns) pairs *= 2;
    pair = int(threadIdx.x) % pairs, group = int(threadIdx.x) / pairs, groups = kThreads / pairs;
  }

  // acc = fade acc + p times a tile of values [S, columns], from slot `first` on; p: [Q][S]; ranges: [Q], or null.
  template <class W>
  MK_DEVICE void add(const char* values, int S, const float* p, const float* fade, const SlotRange* ranges,
                     int64_t first) {
    float part[Q][2] = {};  // of this tile; two-level sums round less
    if (2 * pair >= columns) return;
#pragma unroll(Q == 1 ? 4 : 2)
    for (int i = group; i < S; i += groups) {
      const auto* row = reinterpret_cast<const W*>(values + i * pitch_of<W>(columns)) + 2 * pair;
      const float v0 = to_float(row[0]), v1 = to_float(row[1]);
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        if (ranges != nullptr && !ranges[q].holds(first + i)) continue;  // 0 times NaN would be NaN
        part[q][0] += p[q * S + i] * v0, part[q][1] += p[q * S + i] * v1;
      }
    }
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      acc[q][0] = acc[q][0] * fade[q] + part[q][0], acc[q][1] = acc[q][1] * fade[q] + part[q][1];
    }
  }

  // Stores the sums as [groups][Q][2 pairs].
  MK_DEVICE void store(float* sums) const {
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      sums[((group * Q + q) * pairs + pair) * 2] = acc[q][0];
      sums[((group * Q + q) * pairs + pair) * 2 + 1] = acc[q][1];
    }
  }

  // The sum of a column over the groups, in order.
  MK_DEVICE float total(const float* sums, int q, int column) const {
    float sum = 0;
    for (int g = 0; g < groups; ++g) sum += sums[(g * Q + q) * pairs * 2 + column];
    return sum;
  }
};

// Stores the reads [Q, columns], lse and lse_rest of a block; if there are several ranges, their part of this range.
template <int Q>
MK_DEVICE void store_reads(const Reading& r, const Position& at, const Columns<Q>& columns, const float* sums,
                           const float* m, const float* l) {
  const SoftmaxRead& p = r.p;
  for (int q = 0; q < Q && at.t0 + q < at.tokens; ++q) {
    const int64_t token = at.batch * at.tokens + at.t0 + q, rows = r.ranges.rows;
    const float inverse = l[q] == 0 ? 0.f : 1.f / l[q];
    float* part =
        r.ranges.partial == nullptr ? nullptr : r.ranges.partial + (at.split * rows + token) * p.V + at.column0;
    char* out = part != nullptr || at.columns == 0
                    ? nullptr
                    : token_row(p.read, p.lead, p.read.batch(p.lead, at.batch), p.T, at.t0 + q);
    for (int c = int(threadIdx.x); c < at.columns; c += kThreads) {
      const float sum = columns.total(sums, q, c);
      if (part != nullptr) part[c] = sum;
      else store(out, p.read.dtype, at.column0 + c, l[q] == 0 ? 0.f : sum * inverse);
    }
    if (at.value_block != 0 || threadIdx.x != 0) continue;
    if (part != nullptr) {
      float* ends = r.ranges.partial + r.plan.splits * rows * p.V;
      ends[at.split * rows + token] = m[q];
      ends[(r.plan.splits + at.split) * rows + token] = l[q];
    } else {
      store_lse(p, at.batch, at.t0 + q, m[q], l[q]);
    }
  }
}

template <class X, class W, int Q>
MK_KERNEL(kThreads)
read_stream(MK_PARAM(Reading) r) {
  const SoftmaxRead& p = r.p;
  const StreamPlan& plan = r.plan;
  const int S = plan.slots, tid = int(threadIdx.x);
  Position at = locate<Q>(r);
  char* buffers = shared_memory();
  auto* ranges = p.range ? reinterpret_cast<SlotRange*>(buffers + kStages * plan.stage_bytes) : nullptr;  // [Q]
  auto* query = reinterpret_cast<float*>(buffers + kStages * plan.stage_bytes + (p.range ? Q * sizeof(SlotRange) : 0));
  float* scores = query + Q * plan.padded;  // [Q][S], behind the queries [Q][padded]
  float *m = scores + Q * S, *l = m + Q, *fade = l + Q;
  if (ranges != nullptr) {
    const SlotRange span = load_ranges<Q>(p.range, p.lead, at.batch, p.T, at.t0, p.N, at.begin, at.end, ranges);
    at.begin = span.first, at.end = span.stop;
  }
  if (tid < Q) m[tid] = -kInfinity, l[tid] = 0;
  load_queries<Q>(p.query, p.lead, at.batch, p.T, at.t0, at.tokens, p.K, plan.padded, query);

  Loader<X, W> loader{r, at, buffers};
  for (int i = 0; i < kStages - 1; ++i) loader.prefetch();
  Columns<Q> columns(at.columns);
  float s[Q] = {};  // this lane's share of the scores
  for (Step step{at.begin}; step.first < at.end; step.next(loader.parts, S)) {
    const char* rows = loader.arrived(step);
    if (step.part == plan.key_parts) {
      columns.template add<W>(rows, S, scores, fade, ranges, step.first);
      continue;
    }
    multiply<X, Q>(rows, loader.key_columns(step.part), query + step.part * kPart, plan.padded, S, s);
    if (step.part + 1 == plan.key_parts) {
      store_scores<Q>(s, float(p.scale), S, step.first, at.end, p.mask, loader.mask, ranges, scores);
      __syncthreads();
      soften<Q>(scores, S, m, l, fade);
    }
  }

  wait_copies<0>();
  __syncthreads();
  auto* sums = reinterpret_cast<float*>(buffers);
  columns.store(sums);
  __syncthreads();
  store_reads(r, at, columns, sums, m, l);
}

// One block per token: merges the ranges.
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
  const int64_t shared = kStages * r.plan.stage_bytes + (p.range ? Q * int64_t(sizeof(SlotRange)) : 0) +
                         (Q * r.plan.padded + Q * r.plan.slots + 3 * Q) * 4;
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
