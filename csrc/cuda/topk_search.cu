// topk_search: the k largest s[t, i] = scale <q_t, k_i> + mask_i of every token, best first, ties to the smaller index.
//
// Tokens stay, keys stream (cuda/tiles/stream.h). A warp keeps the sorted list of a token in shared memory; its k-th
// best score is the threshold. Of every 32 scores, those above it are appended to a queue at positions from a ballot
// and prefix sum. A full queue is sorted and merged into the list (bitonic), which raises the threshold. If scores
// ascend, all of them pass: then the cost is one sort of 128 per 96 or more scores, whatever N is.
//
// If more than kFew tokens share a memory and their lists fit shared memory, tiles are used (topk_search_tiles.cu).
//
// There are enough ranges of slots to fill the GPU. Each leaves its list in scratch memory, and a block per token
// merges them. Keys of different slots differ, so the result depends neither on the order of merging nor on the split.
#include "cuda/tiles/chosen_rows.h"
#include "cuda/tiles/fragments.h"
#include "cuda/tiles/search_lists.h"
#include "cuda/tiles/stream_plan.h"
#include "params/topk_search.h"

namespace mk::cuda {
namespace {

constexpr int kWarps = kThreads / 32;

struct Searching {
  TopkSearch p;
  StreamPlan plan;
  int queue;  // length, a power of two, at least that of a list
  Lists lists;
};

template <class X, int Q>
MK_KERNEL(kThreads)
search_stream(MK_PARAM(Searching) r) {
  const TopkSearch& p = r.p;
  const StreamPlan& plan = r.plan;
  const int S = plan.slots, tid = int(threadIdx.x), lane = tid & 31, warp = tid / 32;
  int64_t at = blockIdx.x;
  const int64_t split = at % plan.splits;
  at /= plan.splits;
  const int64_t t0 = at % plan.tiles * Q, batch = at / plan.tiles, tokens = p.lead.folded() * p.T;
  int64_t begin = split * plan.split_rows, end = least(p.N, begin + plan.split_rows);

  char* buffers = shared_memory();
  auto* lists = reinterpret_cast<Key*>(buffers + kStages * plan.stage_bytes);  // [Q]: list, then queue
  const int length = r.lists.length, both = length + r.queue;
  auto* query = reinterpret_cast<float*>(lists + Q * both);
  float* scores = query + Q * plan.padded;
  auto* ranges = p.range ? reinterpret_cast<SlotRange*>(scores + Q * S) : nullptr;  // [Q]
  if (ranges != nullptr) {
    const SlotRange span = load_ranges<Q>(p.range, p.lead, batch, p.T, t0, p.N, begin, end, ranges);
    begin = span.first, end = span.stop;
  }
  for (int q = warp; q < Q; q += kWarps) clear_keys(lists + q * both, both);
  load_queries<Q>(p.query, p.lead, batch, p.T, t0, tokens, p.K, plan.padded, query);

  const char* keys = p.keys.batch(p.lead, batch);
  const char* mask = p.mask ? p.mask.batch(p.lead, batch) : nullptr;
  auto key_columns = [&](int part) { return int(least(kPart, p.K - part * kPart)); };
  auto start_copy = [&](const Step& step) {
    if (step.first < end) {
      fetch<X>({keys + step.part * kPart * int64_t(sizeof(X)), p.keys.row, step.first, end, key_columns(step.part),
                plan.key_packs},
               S, p.mask, mask, buffers + step.buffer * plan.stage_bytes);
    }
    commit_copies();
  };
  Step ahead{begin};
  for (int i = 0; i < kStages - 1; ++i, ahead.next(plan.key_parts, S)) start_copy(ahead);

  float s[Q] = {};
  int queued[(Q + kWarps - 1) / kWarps] = {};  // of this warp's tokens
  for (Step step{begin}; step.first < end; step.next(plan.key_parts, S)) {
    wait_copies<kStages - 2>();
    __syncthreads();  // the part is visible to all threads; the buffer and scores of the step before are free
    start_copy(ahead);
    ahead.next(plan.key_parts, S);
    multiply<X, Q>(buffers + step.buffer * plan.stage_bytes, key_columns(step.part), query + step.part * kPart,
                   plan.padded, S, s);
    if (step.part + 1 < plan.key_parts) continue;
    store_scores<Q>(s, float(p.scale), S, step.first, end, p.mask, mask, ranges, scores);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < (Q + kWarps - 1) / kWarps; ++n) {
      const int q = n * kWarps + warp;
      if (q >= Q || t0 + q >= tokens) continue;
      const KeptList kept{lists + q * both, length, r.queue, p.k};
      for (int i0 = 0; i0 < S; i0 += 32) {
        const int i = i0 + lane;
        kept.offer(i < S ? key_of(scores[q * S + i], step.first + i) : 0, queued[n]);
      }
    }
  }
  wait_copies<0>();
  __syncthreads();
  for (int q = warp; q < Q && t0 + q < tokens; q += kWarps) {
    const Key* list = lists + q * both;
    KeptList{lists + q * both, length, r.queue, p.k}.merge();
    Key* out = r.lists.keys + (split * r.lists.rows + batch * tokens + t0 + q) * length;
    for (int i = lane; i < length; i += 32) out[i] = list[i];
  }
}

// One block per token: `merging` warps merge the lists of its ranges. Then scores, or weights and their lse, and
// indices are written.
MK_KERNEL(kThreads)
finish_search(MK_PARAM(TopkSearch) p, MK_PARAM(View) weights, MK_PARAM(View) lse, MK_PARAM(Lists) r, int merging) {
  const int64_t token = blockIdx.x, tokens = p.lead.folded() * p.T, batch = token / tokens, t = token % tokens;
  const int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) / 32;
  auto* lists = reinterpret_cast<Key*>(shared_memory());  // [merging][length]
  Key* list = lists + warp * r.length;
  if (warp < merging) {
    clear_keys(list, r.length);
    __syncwarp();
    for (int64_t i = warp; i < r.splits; i += merging) {
      merge_keys(list, r.keys + (i * r.rows + token) * r.length, r.length, r.length);
    }
  }
  __syncthreads();
  if (warp != 0) return;
  for (int w = 1; w < merging; ++w) merge_keys(list, lists + w * r.length, r.length, r.length);
  auto* indices = reinterpret_cast<int64_t*>(token_row(p.indices, p.lead, p.indices.batch(p.lead, batch), p.T, t));
  const float top = list[0] == 0 ? 0.f : score_of(list[0]);
  float sum = 0;
  for (int j = lane; j < p.k; j += 32) {
    const Key key = list[j];
    indices[j] = key == 0 ? -1 : slot_of(key);
    if (p.scores) {
      store(token_row(p.scores, p.lead, p.scores.batch(p.lead, batch), p.T, t), p.scores.dtype, j,
            key == 0 ? -kInfinity : score_of(key));
    }
    sum += key == 0 ? 0.f : exponential(score_of(key) - top);
  }
  if (p.scores) return;
  sum = warp_sum(sum);
  if (lane == 0) {
    const float all = list[0] == 0 ? -kInfinity : isinf(top) ? top : top + logf(sum);
    *reinterpret_cast<float*>(token_row(lse, p.lead, lse.batch(p.lead, batch), p.T, t)) = all;
  }
  auto* out = reinterpret_cast<float*>(token_row(weights, p.lead, weights.batch(p.lead, batch), p.T, t));
  for (int j = lane; j < p.k; j += 32) {
    const float e = list[j] == 0 ? 0.f : exponential(score_of(list[j]) - top);
    out[j] = list[j] == 0 || isinf(top) ? e : e / sum;  // beside an infinite score, finite ones have weight 0
  }
}

template <class X, int Q>
void run(const Device& device, const char* name, Searching& r) {
  const TopkSearch& p = r.p;
  r.plan = plan_stream(device, {p.lead, p.T, p.N, p.K, p.keys, 0, 0, 1, Q});
  r.lists.splits = r.plan.splits, r.lists.rows = p.lead.batches() * p.lead.folded() * p.T;
  r.lists.keys = device.scratch<Key>(r.lists.splits * r.lists.rows * r.lists.length);
  const int64_t shared = kStages * r.plan.stage_bytes +
                         Q * ((r.lists.length + r.queue) * int64_t(sizeof(Key)) + (r.plan.padded + r.plan.slots) * 4 +
                              (p.range ? int64_t(sizeof(SlotRange)) : 0));
  launch(device, name, search_stream<X, Q>, p.lead.batches() * r.plan.tiles * r.plan.splits, kThreads, shared, r);
}

// The gradients of chosen scores: 0 where there is no slot.
MK_KERNEL(kThreads) keep_chosen(MK_PARAM(Choice) c, MK_PARAM(View) d_scores, MK_PARAM(View) ds) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, tokens = c.tokens();
  if (at >= c.all_tokens() * c.k) return;
  const int64_t batch = at / c.k / tokens, t = at / c.k % tokens, j = at % c.k;
  const char* index = token_row(c.indices, c.lead, c.indices.batch(c.lead, batch), c.T, t);
  const char* from = token_row(d_scores, c.lead, d_scores.batch(c.lead, batch), c.T, t);
  const bool chosen = reinterpret_cast<const int64_t*>(index)[j] >= 0;
  store(token_row(ds, c.lead, ds.batch(c.lead, batch), c.T, t), ds.dtype, j,
        chosen ? load(from, d_scores.dtype, j) : 0.f);
}

}  // namespace

int list_length(const char* name, const TopkSearch& p) {
  if (p.N >= 0xffffffff || p.k > 1 << 20) {
    throw std::runtime_error(std::string(name) + ": 2^32 slots, or more than 2^20 neighbours, have no CUDA kernel");
  }
  int length = 32;
  while (length < p.k) length *= 2;
  return length;
}

void finish(const Device& device, const char* name, const TopkSearch& p, const View& weights, const View& lse,
            const Lists& lists) {
  constexpr int kMergeRoom = 48 << 10;
  const int64_t bytes = lists.length * int64_t(sizeof(Key)), room = most(1, kMergeRoom / bytes);
  const int merging = int(least(least(kWarps, lists.splits), room));
  launch(device, name, finish_search, lists.rows, kThreads, merging * bytes, p, weights, lse, lists, merging);
}

void search(const Device& device, const char* name, const TopkSearch& p, const View& weights, const View& lse) {
  constexpr int kQueue = 128, kListsOfMany = 256;
  const int64_t tokens = p.lead.folded() * p.T;
  Searching r{p, {}, 0, {list_length(name, p)}};
  const int list = r.lists.length;
  if (tokens > kFew && tiles_take(device, p, list)) {
    r.lists = search_in_tiles(device, name, p, list);
  } else {
    r.queue = int(most(list, kQueue));
    with_queries(list <= kListsOfMany ? queries_at_once(tokens, p.K) : 1,
                 [&]<int Q>() { with_type(p.keys.dtype, [&]<class X>() { run<X, Q>(device, name, r); }); });
  }
  finish(device, name, p, weights, lse, r.lists);
}

View dense(const Device& device, const Choice& c, DType dtype) {
  View v;
  v.dtype = dtype, v.row = c.k * size_of(dtype);
  v.data = device.scratch<char>(c.all_tokens() * v.row);
  int64_t stride = v.row * c.T;
  for (int d = c.lead.rank - 1; d >= 0; --d) {
    v.lead[d] = c.lead.size[d] == 1 ? 0 : stride;
    stride *= c.lead.size[d];
  }
  return v;
}

View chosen_gradients(const Device& device, const char* name, const Choice& c, const View& d_scores) {
  const View ds = dense(device, c);
  launch(device, name, keep_chosen, div_up(c.all_tokens() * c.k, kThreads), kThreads, 0, c, d_scores, ds);
  return ds;
}

void search_gradients(const Device& device, const char* name, const TopkSearchBackward& p, const View& ds) {
  const float scale = float(p.scale);
  if (p.d_query) gather_chosen(device, name, {p.choice, p.K, p.keys, ds, p.d_query, scale});
  sum_chosen(device, name, {p.choice, p.K, p.d_keys, p.query, ds, scale});
  sum_chosen(device, name, {p.choice, 1, p.d_mask, View{}, ds, 1.f});
}

void topk_search(const Device& device, const TopkSearch& p) { search(device, "topk_search", p); }

void topk_search_backward(const Device& device, const TopkSearchBackward& p) {
  const char* name = "topk_search_backward";
  search_gradients(device, name, p, chosen_gradients(device, name, p.choice, p.d_scores));
}

}  // namespace mk::cuda
