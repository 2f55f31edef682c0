// sparse_write:  v_i <- v_i (1 - a e_t) + a w_t  for the entries (t, j) that name slot i, in order, a = weights[t, j].
//
// Slots do not depend on one another. The entries are sorted by slot with a stable sort (cuda/segments.cu). One warp
// per chosen slot and 128 value columns reads its row once, applies the entries in float, and rounds and writes the row
// once. There is a warp per entry, and only that of a slot's first entry works, so the cost is O(T k V) whatever N is.
// Each lane looks up the rows of one of 32 entries; then all lanes apply the entries one by one. An index that names no
// slot writes nothing, nor does a token whose token_mask is not set.
//
// Backward, g = dv' of a slot, walking its entries from the last, v before each of them:
//   da[t, j] = <g, w_t - e_t v>,   dw_t = sum_j a g,   de_t = -sum_j a g v,   g <- g (1 - a e_t),   dv = g in the end
// The forward sweep stores every v in scratch memory. The backward sweep reads v and replaces it by a g. The gradients
// of a token are then summed in the order of j: T k numbers for every column. Columns are taken in panels, so that
// scratch memory is at most kPanelBytes, or 128 columns.
#include "cuda/tiles/chosen_rows.h"
#include "cuda/tiles/device.h"
#include "cuda/tiles/stream.h"
#include "params/sparse_write.h"

namespace mk::cuda {
namespace {

constexpr int kWriteThreads = 128, kWarps = kWriteThreads / 32, kEach = 4, kColumns = 32 * kEach;
constexpr int64_t kPanelBytes = int64_t(256) << 20;

struct Walk {
  SparseWrite p;
  SortedEntries entries;
  int64_t first, blocks;  // in blocks of 128 columns: the first of the panel, and how many
};

struct WalkBack {
  View d_out, d_values, d_write, d_erase, d_weights;
  float *states, *erases;  // [entries][columns of the panel]: v, then a g; -a g v
  float* products;         // [blocks of all columns][entries]: parts of da
};

// The data of one entry. One lane looks it up and passes it to all.
struct Entry {
  int64_t place;
  const char *write, *erase;
  float a;

  MK_DEVICE Entry(const Walk& w, int64_t i, bool there) : place(0), write(nullptr), erase(nullptr), a(0) {
    if (!there) return;
    const Choice& c = w.p.choice;
    place = w.entries.places[i];
    const int64_t token = place / c.k, batch = token / c.tokens(), t = token % c.tokens();
    auto row_of = [&](const View& v) { return token_row(v, c.lead, v.batch(c.lead, batch), c.T, t); };
    write = row_of(w.p.write);
    if (w.p.erase) erase = row_of(w.p.erase);
    a = load(row_of(w.p.weights), w.p.weights.dtype, place % c.k);
  }
  MK_DEVICE Entry(const Entry& own, int lane) {
    auto pointer = [&](const char* x) {
      return reinterpret_cast<const char*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(x), lane));
    };
    place = __shfl_sync(kAllLanes, own.place, lane), a = __shfl_sync(kAllLanes, own.a, lane);
    write = pointer(own.write), erase = pointer(own.erase);
  }
};

// The slot and columns of a warp; `mine` if its entry is the first of a slot.
struct Segment {
  int64_t begin, row, batch, slot, block, column;
  bool mine;

  MK_DEVICE explicit Segment(const Walk& w) {
    const int64_t at = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    begin = at / w.blocks, block = w.first + at % w.blocks;
    const SortedEntries& e = w.entries;
    mine = begin < e.count;
    row = mine ? e.rows[begin] : 0;
    mine = mine && row < e.end && (begin == 0 || e.rows[begin - 1] != row);
    const int64_t N = most(w.p.choice.N, 1);
    batch = row / N, slot = row % N, column = block * kColumns + threadIdx.x % 32;
  }
  MK_DEVICE char* row_of(const View& v, const Lead& lead) const { return v.batch(lead, batch) + slot * v.row; }
};

MK_DEVICE void load_columns(const char* row, DType dtype, int64_t column, int64_t V, float (&x)[kEach]) {
#pragma unroll
  for (int y = 0; y < kEach; ++y) x[y] = column + 32 * y < V ? load(row, dtype, column + 32 * y) : 0.f;
}
MK_DEVICE void store_columns(char* row, DType dtype, int64_t column, int64_t V, const float (&x)[kEach]) {
#pragma unroll
  for (int y = 0; y < kEach; ++y) {
    if (column + 32 * y < V) store(row, dtype, column + 32 * y, x[y]);
  }
}
MK_DEVICE void load_entry(const Walk& w, const Entry& e, int64_t column, float (&x)[kEach], float (&erase)[kEach]) {
  load_columns(e.write, w.p.write.dtype, column, w.p.V, x);
  if (e.erase != nullptr) load_columns(e.erase, w.p.erase.dtype, column, w.p.V, erase);
#pragma unroll
  for (int y = 0; y < kEach && e.erase == nullptr; ++y) erase[y] = float(w.p.erase_scale);
}

// Applies all entries of the segment to v and returns their end; before(place) sees v before each entry.
template <class Before>
MK_DEVICE int64_t walk(const Walk& w, const Segment& s, float (&v)[kEach], Before&& before) {
  const int lane = int(threadIdx.x) % 32;
  for (int64_t i = s.begin;; i += 32) {
    const bool there = i + lane < w.entries.count && w.entries.rows[i + lane] == s.row;
    const Entry own(w, i + lane, there);
    const int n = __popc(__ballot_sync(kAllLanes, there));
    for (int j = 0; j < n; ++j) {
      const Entry e(own, j);
      float x[kEach], erase[kEach];
      load_entry(w, e, s.column, x, erase);
      before(e.place);
#pragma unroll
      for (int y = 0; y < kEach; ++y) v[y] = e.a * x[y] + (1.f - e.a * erase[y]) * v[y];
    }
    if (n < 32) return i + n;
  }
}

MK_KERNEL(kWriteThreads) write_named(MK_PARAM(Walk) w) {
  const Segment s(w);
  if (!s.mine) return;
  char* row = s.row_of(w.p.out, w.p.choice.lead);
  float v[kEach];
  load_columns(row, w.p.out.dtype, s.column, w.p.V, v);
  walk(w, s, v, [](int64_t) {});
  store_columns(row, w.p.out.dtype, s.column, w.p.V, v);
}

MK_KERNEL(kWriteThreads) walk_segments(MK_PARAM(Walk) w, MK_PARAM(WalkBack) b) {
  const Segment s(w);
  if (!s.mine) return;
  const Lead& lead = w.p.choice.lead;
  const int lane = int(threadIdx.x) % 32;
  const int64_t width = w.blocks * kColumns, first = (s.block - w.first) * kColumns + lane;  // of the panel
  float v[kEach], g[kEach];
  load_columns(s.row_of(w.p.values, lead), w.p.values.dtype, s.column, w.p.V, v);
  load_columns(s.row_of(b.d_out, lead), b.d_out.dtype, s.column, w.p.V, g);
  const int64_t end = walk(w, s, v, [&](int64_t place) {
#pragma unroll
    for (int y = 0; y < kEach; ++y) b.states[place * width + first + 32 * y] = v[y];
  });
  for (int64_t i = end; i > s.begin; i -= 32) {
    const Entry own(w, i - 1 - lane, i - 1 - lane >= s.begin);
    for (int j = 0; j < least(32, i - s.begin); ++j) {
      const Entry e(own, j);
      float x[kEach], erase[kEach], sum = 0;
      load_entry(w, e, s.column, x, erase);
      const int64_t at = e.place * width + first;
#pragma unroll
      for (int y = 0; y < kEach; ++y) {
        const float before = b.states[at + 32 * y], flow = e.a * g[y];
        sum += g[y] * (x[y] - erase[y] * before);
        b.states[at + 32 * y] = flow;
        if (b.d_erase) b.erases[at + 32 * y] = -flow * before;
        g[y] *= 1.f - e.a * erase[y];
      }
      sum = warp_sum(sum);
      if (lane == 0) b.products[s.block * w.entries.count + e.place] = sum;
    }
  }
  if (b.d_values) store_columns(s.row_of(b.d_values, lead), b.d_values.dtype, s.column, w.p.V, g);
}

// dw and de of a token: one block per token and 128 columns of the panel.
MK_KERNEL(kWriteThreads) add_entries(MK_PARAM(Walk) w, MK_PARAM(WalkBack) b) {
  const Choice& c = w.p.choice;
  const int64_t token = blockIdx.x / w.blocks, batch = token / c.tokens(), t = token % c.tokens();
  const int64_t width = w.blocks * kColumns, own = blockIdx.x % w.blocks * kColumns + threadIdx.x;
  const int64_t column = w.first * kColumns + own;
  if (column >= w.p.V) return;
  auto row_of = [&](const View& v) { return token_row(v, c.lead, v.batch(c.lead, batch), c.T, t); };
  const auto* index = reinterpret_cast<const int64_t*>(row_of(c.indices));
  const bool silent = w.p.token_mask && *row_of(w.p.token_mask) == 0;
  float write = 0, erase = 0;
  for (int64_t j = 0; j < c.k && !silent; ++j) {
    if (index[j] < 0 || index[j] >= c.N) continue;
    const int64_t at = (token * c.k + j) * width + own;
    write += b.states[at];
    if (b.d_erase) erase += b.erases[at];
  }
  if (b.d_write) store(row_of(b.d_write), b.d_write.dtype, column, write);
  if (b.d_erase) store(row_of(b.d_erase), b.d_erase.dtype, column, erase);
}

// da: adds its parts in the order of the columns, one thread per entry.
MK_KERNEL(kWriteThreads) add_products(MK_PARAM(Walk) w, MK_PARAM(WalkBack) b, int64_t blocks) {
  const Choice& c = w.p.choice;
  const int64_t place = int64_t(blockIdx.x) * kWriteThreads + threadIdx.x;
  if (place >= w.entries.count) return;
  const int64_t token = place / c.k, batch = token / c.tokens(), t = token % c.tokens();
  auto row_of = [&](const View& v) { return token_row(v, c.lead, v.batch(c.lead, batch), c.T, t); };
  const bool silent = w.p.token_mask && *row_of(w.p.token_mask) == 0;
  const int64_t index = silent ? -1 : reinterpret_cast<const int64_t*>(row_of(c.indices))[place % c.k];
  float sum = 0;
  for (int64_t n = 0; index >= 0 && index < c.N && n < blocks; ++n) sum += b.products[n * w.entries.count + place];
  store(row_of(b.d_weights), b.d_weights.dtype, place % c.k, sum);
}

// Copies all rows of one tensor to another of the same dtype, both [lead, N, V]: one warp per row, one X at a time.
template <class X>
MK_KERNEL(kWriteThreads)
copy_rows(MK_PARAM(Lead) lead, int64_t N, int64_t units, MK_PARAM(View) from, MK_PARAM(View) to) {
  const int64_t at = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, batch = at / N, i = at % N;
  if (at >= lead.batches() * N) return;
  const auto* x = reinterpret_cast<const X*>(from.batch(lead, batch) + i * from.row);
  auto* y = reinterpret_cast<X*>(to.batch(lead, batch) + i * to.row);
  for (int64_t u = threadIdx.x % 32; u < units; u += 32) y[u] = x[u];
}

void copy_memory(const Device& device, const char* name, const SparseWrite& p, const View& from, const View& to) {
  const Lead& lead = p.choice.lead;
  const int64_t N = p.choice.N, blocks = div_up(lead.batches() * N, kWarps);
  if (blocks == 0) return;
  const bool packs = in_packs(from, lead, p.V) && in_packs(to, lead, p.V);
  auto copy = [&]<class X>(X) {
    const int64_t units = p.V * size_of(from.dtype) / int64_t(sizeof(X));
    launch(device, name, copy_rows<X>, blocks, kWriteThreads, 0, lead, N, units, from, to);
  };
  if (packs) copy(float4{});
  else if (size_of(from.dtype) == 4) copy(float{});
  else copy(uint16_t{});
}

Walk walk_of(const Device& device, const char* name, const SparseWrite& p) {
  const int64_t rows = p.choice.lead.batches() * p.choice.N;
  return {p, sort_entries(device, name, p.choice, View{}, rows, p.token_mask), 0, div_up(p.V, kColumns)};
}

}  // namespace

void sparse_write(const Device& device, const SparseWrite& p) {
  constexpr const char* kName = "sparse_write";
  if (p.out.data != p.values.data) copy_memory(device, kName, p, p.values, p.out);
  const Walk w = walk_of(device, kName, p);
  launch(device, kName, write_named, div_up(w.entries.count * w.blocks, kWarps), kWriteThreads, 0, w);
}

void sparse_write_backward(const Device& device, const SparseWriteBackward& b) {
  constexpr const char* kName = "sparse_write_backward";
  const SparseWrite& p = b.forward;
  if (b.d_values) copy_memory(device, kName, p, b.d_out, b.d_values);
  Walk w = walk_of(device, kName, p);
  const int64_t blocks = w.blocks, entries = w.entries.count;
  const int64_t block_bytes = most(1, entries) * kColumns * int64_t(sizeof(float));
  const int64_t panel = least(blocks, most(1, kPanelBytes / block_bytes));
  WalkBack s{b.d_out, b.d_values, b.d_write, b.d_erase, b.d_weights, nullptr, nullptr, nullptr};
  s.states = device.scratch<float>(entries * panel * kColumns);
  if (b.d_erase) s.erases = device.scratch<float>(entries * panel * kColumns);
  s.products = device.scratch<float>(entries * blocks);
  for (w.first = 0; w.first < blocks; w.first += panel) {
    w.blocks = least(panel, blocks - w.first);
    launch(device, kName, walk_segments, div_up(entries * w.blocks, kWarps), kWriteThreads, 0, w, s);
    if (b.d_write || b.d_erase)
      launch(device, kName, add_entries, p.choice.all_tokens() * w.blocks, kWriteThreads, 0, w, s);
  }
  if (b.d_weights) launch(device, kName, add_products, div_up(entries, kWriteThreads), kWriteThreads, 0, w, s, blocks);
}

}  // namespace mk::cuda
