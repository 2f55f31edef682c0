// out[i] = factor * sum over (t, j) with index[t, j] = i of weight[t, j] row_t
//
// The entries (t, j) are sorted by row of the result with a stable sort, so every row is summed in the order of the
// tokens: the same bits on every run, and no atomics whose order matters. It is a radix sort with 8 bits per pass, the
// lowest first: every block counts the digits of its chunk, one block turns the counts into positions, every block
// writes its entries there in order. An index that names no row of the memory gets a key behind all rows and is never
// summed.
//
// Then one warp per row of the result finds its entries by bisection and sums them; rows that nobody chose become zero.
#include <utility>

#include "cuda/tiles/chosen_rows.h"
#include "cuda/tiles/numbers.h"

namespace mk::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kDigits = 256;
constexpr int kRun = 128;  // entries that are summed in float

struct Entries {
  uint32_t *keys, *keys_after;
  uint32_t *places, *places_after;  // position t * k + j of every entry
  uint32_t* counts;                 // [digit][block]
  int64_t count, chunk;
  int64_t blocks;
};

MK_KERNEL(kThreads)
number_entries(MK_PARAM(Choice) c, MK_PARAM(View) result, MK_PARAM(View) mask, MK_PARAM(Entries) e, int64_t rows) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, tokens = c.tokens();
  if (at >= e.count) return;
  const int64_t batch = at / c.k / tokens, t = at / c.k % tokens;
  const char* row = token_row(c.indices, c.lead, c.indices.batch(c.lead, batch), c.T, t);
  const bool silent = mask && *token_row(mask, c.lead, mask.batch(c.lead, batch), c.T, t) == 0;
  const int64_t index = silent ? -1 : reinterpret_cast<const int64_t*>(row)[at % c.k];
  int64_t first = batch * c.N;
  if (result) {  // batches may share rows of the result; their address identifies them
    const int64_t group = c.N * result.row;
    first = group == 0 ? 0 : (result.batch(c.lead, batch) - result.data) / group * c.N;
  }
  e.keys[at] = uint32_t(index >= 0 && index < c.N ? first + index : rows);
  e.places[at] = uint32_t(at);
}

MK_KERNEL(kThreads) count_digits(MK_PARAM(Entries) e, int shift) {
  auto* counts = reinterpret_cast<unsigned*>(shared_memory());
  counts[threadIdx.x] = 0;
  __syncthreads();
  const int64_t end = least(e.count, (int64_t(blockIdx.x) + 1) * e.chunk);
  for (int64_t i = blockIdx.x * e.chunk + threadIdx.x; i < end; i += kThreads) {
    atomicAdd(&counts[e.keys[i] >> shift & (kDigits - 1)], 1u);  // the order of atomics does not change counts
  }
  __syncthreads();
  e.counts[threadIdx.x * e.blocks + blockIdx.x] = counts[threadIdx.x];
}

// One block: turns every count into the sum of the counts before it.
MK_KERNEL(kThreads) add_up_counts(MK_PARAM(Entries) e) {
  auto* sums = reinterpret_cast<unsigned*>(shared_memory());
  const int64_t begin = threadIdx.x * e.blocks, end = begin + e.blocks;
  unsigned own = 0;
  for (int64_t i = begin; i < end; ++i) own += e.counts[i];
  sums[threadIdx.x] = own;
  __syncthreads();
  unsigned before = 0;
  for (int i = 0; i < int(threadIdx.x); ++i) before += sums[i];
  for (int64_t i = begin; i < end; ++i) {
    const unsigned n = e.counts[i];
    e.counts[i] = before;
    before += n;
  }
}

MK_KERNEL(kThreads) place_entries(MK_PARAM(Entries) e, int shift) {
  auto* next = reinterpret_cast<unsigned*>(shared_memory());  // [digit]: position of its next entry
  unsigned* found = next + kDigits;                           // [warp][digit]: its entries in this round
  const int tid = int(threadIdx.x), warp = tid / 32, lane = tid % 32;
  next[tid] = e.counts[tid * e.blocks + blockIdx.x];
  const int64_t begin = blockIdx.x * e.chunk, end = least(e.count, begin + e.chunk);
  for (int64_t round = begin; round < end; round += kThreads) {
    for (int w = 0; w < kWarps; ++w) found[w * kDigits + tid] = 0;
    __syncthreads();
    const int64_t i = round + tid;
    const uint32_t key = i < end ? e.keys[i] : 0;
    const unsigned digit = i < end ? key >> shift & (kDigits - 1) : kDigits;  // no entry: a digit of its own
    const unsigned same = __match_any_sync(kAllLanes, digit);
    const int rank = __popc(same & ((1u << lane) - 1));
    if (i < end && rank == 0) found[warp * kDigits + digit] = unsigned(__popc(same));
    __syncthreads();
    if (i < end) {
      unsigned at = next[digit] + unsigned(rank);
      for (int w = 0; w < warp; ++w) at += found[w * kDigits + digit];
      e.keys_after[at] = key;
      e.places_after[at] = e.places[i];
    }
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) next[tid] += found[w * kDigits + tid];
    __syncthreads();
  }
}

// Column `column` of the row of entry `at`.
MK_DEVICE float entry_column(const ChosenSum& s, int64_t at, int64_t batch, int64_t t, int64_t column) {
  const Choice& c = s.choice;
  const char* row = token_row(s.tokens, c.lead, s.tokens.batch(c.lead, batch), c.T, t);
  if (s.signs.words == nullptr) return load(row, s.tokens.dtype, column);
  const View& w = s.heads.weights;
  const char* weights = token_row(w, c.lead, w.batch(c.lead, batch), c.T, t);
  float sum = 0;
  for (int64_t h = 0; h < s.heads.H; ++h, row += s.heads.stride) {
    if (s.signs.has(at, h)) sum += load(weights, w.dtype, h) * load(row, s.tokens.dtype, column);
  }
  return sum;
}

MK_KERNEL(kThreads) sum_segments(MK_PARAM(ChosenSum) s, MK_PARAM(SortedEntries) e) {
  const Choice& c = s.choice;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, tokens = c.tokens();
  if (row >= s.out.rows) return;
  const int lane = int(threadIdx.x) & 31;
  int64_t begin = 0;
  for (int64_t end = e.count; begin < end;) {
    const int64_t middle = (begin + end) / 2;
    if (e.rows[middle] < row) begin = middle + 1;
    else end = middle;
  }
  char* out = s.out.view.data + row * s.out.view.row;
  for (int64_t c0 = 0; c0 < s.width; c0 += 32) {
    const int64_t column = c0 + lane;
    // Any number of entries may name a row, and a float sum that has reached 2^24 times a term no longer changes.
    double total = 0;
    float sum = 0;
    for (int64_t i = begin; i < e.count && e.rows[i] == row; ++i) {
      if ((i - begin) % kRun == 0) total += sum, sum = 0;
      const int64_t at = e.places[i], batch = at / c.k / tokens, t = at / c.k % tokens;
      const float w =
          load(token_row(s.weights, c.lead, s.weights.batch(c.lead, batch), c.T, t), s.weights.dtype, at % c.k);
      if (column >= s.width) continue;
      if (!s.tokens) sum += w;
      else sum += w * entry_column(s, at, batch, t, column);
    }
    if (column < s.width) store(out, s.out.view.dtype, column, s.factor * float(total + sum));
  }
}

}  // namespace

SortedEntries sort_entries(const Device& device, const char* name, const Choice& c, const View& result, int64_t rows,
                           const View& token_mask) {
  Entries e{};
  e.count = c.all_tokens() * c.k;
  if (e.count >= int64_t(1) << 32 || rows >= int64_t(1) << 32) {
    throw std::runtime_error(std::string(name) + ": 2^32 or more chosen slots, or rows, have no CUDA kernel");
  }
  e.chunk = most(2048, round_up(div_up(e.count, device.sms * 2), kThreads));
  e.blocks = div_up(e.count, e.chunk);
  e.keys = device.scratch<uint32_t>(e.count), e.keys_after = device.scratch<uint32_t>(e.count);
  e.places = device.scratch<uint32_t>(e.count), e.places_after = device.scratch<uint32_t>(e.count);
  e.counts = device.scratch<uint32_t>(kDigits * e.blocks);
  launch(device, name, number_entries, div_up(e.count, kThreads), kThreads, 0, c, result, token_mask, e, rows);
  for (int shift = 0; e.count > 0 && shift < 32 && rows >> shift != 0; shift += 8) {
    launch(device, name, count_digits, e.blocks, kThreads, kDigits * 4, e, shift);
    launch(device, name, add_up_counts, 1, kThreads, kThreads * 4, e);
    launch(device, name, place_entries, e.blocks, kThreads, (1 + kWarps) * kDigits * 4, e, shift);
    std::swap(e.keys, e.keys_after);
    std::swap(e.places, e.places_after);
  }
  return {e.keys, e.places, e.count, rows};
}

void sum_chosen(const Device& device, const char* name, const ChosenSum& sum) {
  if (!sum.out || sum.out.rows * sum.width == 0) return;
  const SortedEntries e = sort_entries(device, name, sum.choice, sum.out.view, sum.out.rows);
  launch(device, name, sum_segments, div_up(sum.out.rows, kWarps), kThreads, 0, sum, e);
}

}  // namespace mk::cuda
