// Results of gradients: which rows a batch shares with others, and sums that are added to rows of slots.
#pragma once

#include <initializer_list>

#include "cpu/tiles/scores.h"

namespace mk::MK_ISA {

// Chunks of slots have partial results, which are added up: at most so many chunks, and bytes.
constexpr int64_t kChunks = 64;
constexpr int64_t kPartialBytes = int64_t(4) << 20;
// With so many batches or more, batches run in parallel instead of the chunks of one.
constexpr int64_t kManyBatches = 8;

// Tiles of scores: element (t, slot) at data[t * ts + slot * is].
template <class F>
struct TileStrides {
  int64_t ts, is;
};

// Are the rows of `view` that belong to `batch` written for the first time? False if an earlier batch shares them.
inline bool first_visit(const View& view, const Lead& lead, int64_t batch) {
  for (int d = lead.rank - 1; d >= 0; --d) {
    if (lead.shared[d]) continue;
    if (batch % lead.size[d] != 0 && view.lead[d] == 0) return false;
    batch /= lead.size[d];
  }
  return true;
}
inline bool rows_are_shared(const View& view, const Lead& lead) {
  if (!view) return false;
  for (int d = 0; d < lead.rank; ++d) {
    if (!lead.shared[d] && lead.size[d] > 1 && view.lead[d] == 0) return true;
  }
  return false;
}

// Runs body(batch, memory) for every batch; `bytes`: of its memory. Batches run one after the other, each on all
// threads. Many batches run in parallel instead, unless two of them add to the same rows of a result.
template <class Body>
void each_batch(int64_t batches, size_t bytes, const Lead& lead, std::initializer_list<const View*> results,
                Body&& body) {
  bool apart = true;
  for (const View* view : results) apart = apart && !rows_are_shared(*view, lead);
  if (batches >= kManyBatches && apart) {
    parallel(batches, bytes, body);
    return;
  }
  Buffer<char> memory{int64_t(bytes)};
  for (int64_t batch = 0; batch < batches; ++batch) body(batch, memory.data());
}

// sums[j] += sum_t D(t, j), and tokens[t] += sum_j D(t, j) where wanted.
template <class F>
inline void add_sums(const F* D, TileStrides<F> at, int64_t n, int64_t slots, F* sums, F* tokens) {
  constexpr int W = kLanes<F>;
  if (at.is == 1) {
    for (int64_t t = 0; t < n; ++t) {
      const F* d = D + t * at.ts;
      F total = 0;
      for (int64_t j = 0; j < slots; ++j) sums[j] += d[j], total += d[j];
      if (tokens != nullptr) tokens[t] += total;
    }
    return;
  }
  for (int64_t j = 0; j < slots; ++j) {  // lanes beyond n hold zeros
    Vec<F> total = load<F>(D + j * at.is);
    for (int64_t l = W; l < at.is; l += W) total += load<F>(D + j * at.is + l);
    sums[j] += sum<F>(total);
  }
  for (int64_t j = 0; j < slots && tokens != nullptr; ++j) {
    for (int64_t t = 0; t < n; ++t) tokens[t] += D[j * at.is + t];
  }
}

// Adds (or assigns) factor * rows[j] to the rows of slots first + place(j). Assignment zeroes the rows of empty slots,
// and uses non-temporal stores if the whole result has so many `bytes` that it is not read from a cache again.
template <class F>
inline void scatter_rows(const View& view, const Lead& lead, int64_t batch, bool assign, int64_t first, int64_t count,
                         const SlotBlock<F>& block, const F* rows, int64_t ld, int64_t width, F factor,
                         int64_t bytes = 0) {
  constexpr int W = kLanes<F>;
  char* base = view.batch(lead, batch) + first * view.row;
  if (assign && block.n < count) {
    for (int64_t i = 0; i < count; ++i) std::memset(base + i * view.row, 0, size_t(width) * sizeof(F));
  }
  auto row = [&](int64_t j) { return reinterpret_cast<F*>(base + block.place(j) * view.row); };
  if (!assign) {
    for (int64_t j = 0; j < block.n; ++j) {
      F* out = row(j);
      const F* in = rows + j * ld;
      for (int64_t c = 0; c < width; ++c) out[c] += factor * in[c];
    }
    return;
  }
  with_stores(is_non_temporal(base, view.row, bytes), [&](auto put) {
    for (int64_t j = 0; j < block.n; ++j) {
      F* out = row(j);
      const F* in = rows + j * ld;
      int64_t c = 0;
      for (; c + W <= width; c += W) put(out + c, factor * load<F>(in + c));
      for (; c < width; ++c) out[c] = factor * in[c];
    }
  });
}

}  // namespace mk::MK_ISA
