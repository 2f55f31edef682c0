// indexer_search:  the k largest of s[t, i] = sum_h w[t, h] relu(x[t, h, i]) + mask_i,  x[t, h, i] = scale <q_th, k_i>,
// best first, ties to the smaller index.
//
// The search is matrix products: tiles on the tensor cores (indexer_search_tiles.cu). Calls whose rows or lists do not
// fit shared memory are searched by rows: a warp has a token and a range of slots, and takes several rows of keys at a
// time from global memory (cuda/tiles/row_packs.h), once for every head. That is right for all widths, and slow.
//
// backward, of the chosen slots i = i[t, j], with g[t, h, j] = ds[t, j] where x[t, h, i] > 0, else 0:
//   y_th = scale sum_j g[t, h, j] k_i,   dq_th = w[t, h] y_th,   dw[t, h] = <q_th, y_th>
//   dk_i = scale sum_{t, j: i[t, j] = i} ds[t, j] sum_{h: x > 0} w[t, h] q_th
//   dmask_i = sum_{t, j: i[t, j] = i} ds[t, j]
//
// The products of the chosen slots are made again. Their signs are all that the sums need: T k H bits in scratch
// memory. Signs, dq and dw are made in tiles on the tensor cores (indexer_search_tiles_backward.cu); for keys wider
// than 128 by rows, where y_th is a sum of gathered rows, one warp per token and head. dk is a sum over entries sorted
// by slot (segments.cu), whose row is a sum over heads.
#include "cuda/tiles/chosen_warps.h"
#include "cuda/tiles/head_signs.h"

namespace mk::cuda {
namespace {

constexpr int kLanes = 32;

struct Searching {
  IndexerSearch q;
  Lists lists;
  int queue;
  int64_t split_rows;  // slots per range, a multiple of 32
};

// x of the slot `slot` for the head at `query`, on every lane of the group that shares the row.
template <class X, bool aligned>
MK_DEVICE float head_product(const RowSource& rows, int64_t slot, int G, const char* query, DType dtype, float scale) {
  return scale * multiply_row<X, aligned>(rows, slot, G, [&](int64_t column) { return load(query, dtype, column); });
}

// A block is one warp, with a token and a range of slots.
template <class X, bool aligned>
MK_KERNEL(kLanes)
search_rows(MK_PARAM(Searching) r) {
  const TopkSearch& p = r.q.search;
  const Heads& heads = r.q.heads;
  const int lane = int(threadIdx.x);
  const int64_t tokens = p.lead.folded() * p.T, at = blockIdx.x / r.lists.splits, split = blockIdx.x % r.lists.splits;
  const int64_t batch = at / tokens, t = at % tokens;
  const KeptList kept{reinterpret_cast<Key*>(shared_memory()), r.lists.length, r.queue, p.k};
  clear_keys(kept.list, kept.length + kept.queue);
  __syncwarp();
  SlotRange range{split * r.split_rows, least(p.N, (split + 1) * r.split_rows)};
  if (p.range) {
    const SlotRange own = range_of(p.range, p.lead, batch, p.T, t, p.N);
    range = {most(range.first, own.first), least(range.stop, own.stop)};
  }
  const RowSource rows{p.keys.batch(p.lead, batch), p.keys.row, p.N, p.K};
  const char* mask = p.mask ? p.mask.batch(p.lead, batch) : nullptr;
  const char* query = token_row(p.query, p.lead, p.query.batch(p.lead, batch), p.T, t);
  const char* weights = token_row(heads.weights, p.lead, heads.weights.batch(p.lead, batch), p.T, t);
  const int G = lanes_per_row<X>(p.K);
  int queued = 0;
  for (int64_t i0 = range.first; i0 < range.stop; i0 += kLanes / G) {
    const int64_t i = i0 + lane / G;
    const float added = i < range.stop ? mask_at(p.mask, mask, i) : -kInfinity;
    const bool open = added != -kInfinity;
    float sum = 0;
    for (int64_t h = 0; h < heads.H; ++h) {
      const float x =
          head_product<X, aligned>(rows, open ? i : -1, G, query + h * heads.stride, p.query.dtype, float(p.scale));
      sum += load(weights, heads.weights.dtype, h) * relu(x);
    }
    kept.offer(open && lane % G == 0 ? key_of(sum + added, i) : 0, queued);
  }
  kept.merge();
  Key* out = r.lists.keys + (split * r.lists.rows + at) * kept.length;
  for (int i = lane; i < kept.length; i += kLanes) out[i] = kept.list[i];
}

Lists search_by_rows(const Device& device, const char* name, const IndexerSearch& q) {
  constexpr int kQueue = 128;
  constexpr int64_t kWarpsPerSm = 16, kLeastSlots = 128;  // warps that hide the latency of rows; slots of a range
  const TopkSearch& p = q.search;
  Searching r{q, {list_length(name, p)}, kQueue, 0};
  r.lists.rows = p.lead.batches() * p.lead.folded() * p.T;
  const int64_t wanted = div_up(device.sms * kWarpsPerSm, most(r.lists.rows, 1));
  r.split_rows = round_up(most(kLeastSlots, div_up(p.N, wanted)), kLanes);
  r.lists.splits = most(1, div_up(p.N, r.split_rows));
  r.lists.keys = device.scratch<Key>(r.lists.splits * r.lists.rows * r.lists.length);
  const int64_t shared = (r.lists.length + r.queue) * int64_t(sizeof(Key));
  with_rows(p.keys, p.lead, p.K, [&]<class X, bool aligned>() {
    launch(device, name, search_rows<X, aligned>, r.lists.rows * r.lists.splits, kLanes, shared, r);
  });
  return r.lists;
}

struct Backward {
  IndexerSearchBackward b;
  View ds;  // of the chosen scores
  Signs signs;
  NamedParts parts;

  MK_DEVICE const char* query(const Token& token, int64_t h) const {
    return token.row(b.search.query, b.search.choice) + h * b.heads.stride;
  }
};

// A warp per token and part of its chosen slots: the signs of the products with all heads. A slot outside the memory
// has all of them, so that its NaN reaches the sums.
template <class X, bool aligned>
MK_KERNEL(kThreads)
find_signs(MK_PARAM(Backward) r) {
  const TopkSearchBackward& s = r.b.search;
  const Choice& c = s.choice;
  const Token token(c, r.parts.count);
  if (token.at >= c.all_tokens()) return;
  const auto* index = reinterpret_cast<const int64_t*>(token.row(c.indices, c));
  const RowSource rows{s.keys.batch(c.lead, token.batch), s.keys.row, c.N, s.K};
  const int G = lanes_per_row<X>(s.K), lane = int(threadIdx.x) & 31;
  const int64_t end = least(c.k, (token.part + 1) * r.parts.span);
  for (int64_t j0 = token.part * r.parts.span; j0 < end; j0 += 32 / G) {
    const int64_t j = j0 + lane / G, slot = j < end ? index[j] : -1;
    uint16_t* out = r.signs.of(token.at * c.k + j);
    unsigned word = 0;
    for (int64_t h = 0; h < r.b.heads.H; ++h) {
      const float x = head_product<X, aligned>(rows, slot, G, r.query(token, h), s.query.dtype, float(s.scale));
      word |= unsigned(!(scored(slot, c.N, x) <= 0)) << h % Signs::kBits;
      if ((h + 1) % Signs::kBits != 0 && h + 1 < r.b.heads.H) continue;
      if (j < end && lane % G == 0) out[h / Signs::kBits] = uint16_t(word);
      word = 0;
    }
  }
}

// A warp per token and head: y, and from it the gradients of the query and of the head weight.
template <class X, bool aligned>
MK_KERNEL(kThreads)
sum_heads(MK_PARAM(Backward) r) {
  const TopkSearchBackward& s = r.b.search;
  const Choice& c = s.choice;
  const Heads& heads = r.b.heads;
  const Token token(c, heads.H);  // its part is the head
  if (token.at >= c.all_tokens()) return;
  const int64_t h = token.part;
  const auto* index = reinterpret_cast<const int64_t*>(token.row(c.indices, c));
  const auto* ds = reinterpret_cast<const float*>(token.row(r.ds, c));
  const RowSource rows{s.keys.batch(c.lead, token.batch), s.keys.row, c.N, s.K};
  const char* query = r.query(token, h);
  const float w = load(token.row(heads.weights, c), heads.weights.dtype, h);
  float product = 0;
  sum_rows<X, aligned>(
      rows, int(c.k), [&](int j) { return r.signs.has(token.at * c.k + j, h) ? index[j] : -1; },
      [&](int j) { return ds[j]; },
      [&](int64_t column, float y) {
        y *= float(s.scale);
        product += y * load(query, s.query.dtype, column);
        if (s.d_query) store(token.row(s.d_query, c) + h * r.b.d_stride, s.d_query.dtype, column, w * y);
      });
  product = warp_sum(product);
  if (r.b.d_weights && (threadIdx.x & 31) == 0) {
    store(token.row(r.b.d_weights, c), r.b.d_weights.dtype, h, product);
  }
}

}  // namespace

void indexer_search(const Device& device, const IndexerSearch& q) {
  const char* name = "indexer_search";
  Lists lists = search_heads_in_tiles(device, name, q);
  if (lists.keys == nullptr) lists = search_by_rows(device, name, q);
  finish(device, name, q.search, View{}, View{}, lists);
}

void indexer_search_backward(const Device& device, const IndexerSearchBackward& b) {
  const char* name = "indexer_search_backward";
  const TopkSearchBackward& s = b.search;
  const Choice& c = s.choice;
  const int64_t words = div_up(b.heads.H, Signs::kBits);
  Backward r{b, chosen_gradients(device, name, c, s.d_scores), {nullptr, words}, cut_named(device, c)};
  r.signs.words = device.scratch<uint16_t>(c.all_tokens() * c.k * words);
  const bool wanted = s.d_query || b.d_weights || s.d_keys;
  if (wanted && !head_gradients_in_tiles(device, name, b, r.ds, r.signs)) {
    with_rows(s.keys, c.lead, s.K, [&]<class X, bool aligned>() {
      launch(device, name, find_signs<X, aligned>, div_up(c.all_tokens() * r.parts.count, kWarps), kThreads, 0, r);
      if (!s.d_query && !b.d_weights) return;
      launch(device, name, sum_heads<X, aligned>, div_up(c.all_tokens() * b.heads.H, kWarps), kThreads, 0, r);
    });
  }
  sum_chosen(device, name, {c, s.K, s.d_keys, s.query, r.ds, float(s.scale), b.heads, r.signs});
  sum_chosen(device, name, {c, 1, s.d_mask, View{}, r.ds, 1.f});
}

}  // namespace mk::cuda
