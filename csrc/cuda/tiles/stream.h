// Few tokens and many slots: rows of the memory stream through shared memory, the tokens stay.
//
// A block of 128 threads has Q tokens and a range of slots, in tiles of S. A tile's key rows are loaded in parts of at
// most kPart columns, several for wide keys, by 16-byte cp.async copies into one of kStages buffers: two parts are
// always in flight while a third is used. Rows beyond the range and rows of empty slots are filled with zeros: their
// content is never read. Rows that are not aligned to 16 bytes are copied number by number.
//
// 128 / S neighbouring lanes share a slot. Each multiplies every (128 / S)-th pack of 16 bytes with all Q tokens, then
// they sum by shuffles. The pitch of rows is one pack more than their length, so that lanes of different slots use
// different banks.
#pragma once

#include "cuda/tiles/slot_ranges.h"

namespace mk::cuda {

constexpr int kThreads = 128, kStages = 3, kPart = 256;

// The layout of one call over blocks.
struct StreamPlan {
  int64_t tiles;                // of tokens, per batch
  int64_t splits;               // of the slots
  int64_t split_rows;           // slots per split, a multiple of `slots`
  int slots;                    // S: a power of two in [4, 64]
  int key_parts;                // parts per key row
  int padded;                   // key width rounded up to whole packs, the layout of the queries in shared memory
  int stage_bytes;              // of one buffer
  bool key_packs, value_packs;  // rows are aligned to 16 bytes
};

// A part of S rows that is copied into a buffer.
struct Part {
  const char* rows;  // column 0 of the part in row 0 of the batch
  int64_t stride;    // bytes from row to row
  int64_t first;     // the tile's first row, within the batch
  int64_t end;       // rows from here on do not exist
  int columns;       // of this part
  bool packs;
};

// The position of a block in its range: part `part` of the tile at row `first`, in buffer `buffer`. Counted, since
// division is slow.
struct Step {
  int64_t first;
  int part = 0, buffer = 0;
  MK_DEVICE void next(int parts, int S) {
    if (++part == parts) part = 0, first += S;
    if (++buffer == kStages) buffer = 0;
  }
};

template <class X>
MK_BOTH constexpr int packs_of(int columns) {
  return (columns + Pack<X>::size - 1) / Pack<X>::size;
}

// The pitch in bytes of a part in its buffer.
template <class X>
MK_BOTH constexpr int pitch_of(int columns) {
  return (packs_of<X>(columns) + 1) * 16;
}

// All threads: starts the copy of a part. The caller commits.
template <class X>
MK_DEVICE void fetch(const Part& part, int S, const View& mask, const char* mask_base, char* buffer) {
  constexpr int E = Pack<X>::size;
  const int packs = packs_of<X>(part.columns), pitch = pitch_of<X>(part.columns);
  for (int i = int(threadIdx.x); i < S * packs; i += kThreads) {
    const int r = i / packs, c = i % packs;
    const int64_t row = part.first + r;
    const bool open = row < part.end && mask_at(mask, mask_base, row) != -kInfinity;
    const char* from = part.rows + (open ? row : 0) * part.stride;
    char* to = buffer + r * pitch + c * 16;
    if (part.packs) {
      copy16(to, from + c * 16, open);
    } else {
      Pack<X> pack;
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const int column = c * E + e;
        pack.x[e] = open && column < part.columns ? reinterpret_cast<const X*>(from)[column] : from_float<X>(0.f);
      }
      *reinterpret_cast<Pack<X>*>(to) = pack;
    }
  }
}

// Adds this lane's share of <query_q, key_slot> over one part to s[q]. `query`: the part's first column of [Q][padded]
// floats.
template <class X, int Q>
MK_DEVICE void multiply(const char* buffer, int columns, const float* query, int padded, int S, float (&s)[Q]) {
  constexpr int E = Pack<X>::size;
  const int lanes = kThreads / S, slot = int(threadIdx.x) / lanes, packs = packs_of<X>(columns);
  const char* row = buffer + slot * pitch_of<X>(columns);
  for (int c = int(threadIdx.x) % lanes; c < packs; c += lanes) {
    const Pack<X> pack = *reinterpret_cast<const Pack<X>*>(row + c * 16);
#pragma unroll
    for (int e = 0; e < E; e += 4) {
      const float x0 = to_float(pack.x[e]), x1 = to_float(pack.x[e + 1]);
      const float x2 = to_float(pack.x[e + 2]), x3 = to_float(pack.x[e + 3]);
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const auto y = *reinterpret_cast<const Pack<float>*>(query + q * padded + c * E + e);
        s[q] += x0 * y.x[0] + x1 * y.x[1] + x2 * y.x[2] + x3 * y.x[3];
      }
    }
  }
}

// After the last part: sums the shares and stores the scores of the tile, [Q][S]; -inf where there is no slot, or none
// in the range of the token. ranges: [Q], or null.
template <int Q>
MK_DEVICE void store_scores(float (&s)[Q], float scale, int S, int64_t first, int64_t end, const View& mask,
                            const char* mask_base, const SlotRange* ranges, float* scores) {
  const int lanes = kThreads / S, slot = int(threadIdx.x) / lanes;
  const float added = first + slot < end ? mask_at(mask, mask_base, first + slot) : -kInfinity;
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    for (int d = lanes / 2; d > 0; d >>= 1) s[q] += __shfl_xor_sync(kAllLanes, s[q], d);
    if (int(threadIdx.x) % lanes == q % lanes) {
      const bool open = added != -kInfinity && (ranges == nullptr || ranges[q].holds(first + slot));
      scores[q * S + slot] = open ? score(scale, s[q], added) : -kInfinity;
    }
    s[q] = 0;
  }
}

// All threads: the ranges of tokens [t0, t0 + Q) into `ranges`. Returns the slots of [begin, end) that some of them may
// address. Ends with a barrier.
template <int Q>
MK_DEVICE SlotRange load_ranges(const View& range, const Lead& lead, int64_t batch, int64_t T, int64_t t0, int64_t N,
                                int64_t begin, int64_t end, SlotRange* ranges) {
  if (int(threadIdx.x) < Q) ranges[threadIdx.x] = range_of(range, lead, batch, T, t0 + threadIdx.x, N);
  __syncthreads();
  const SlotRange span = span_of(ranges, Q);
  return {most(begin, span.first), least(end, span.stop)};
}

// All threads: the queries of tokens [t0, t0 + Q) as [Q][padded] floats, zeros beyond.
template <int Q>
MK_DEVICE void load_queries(const View& query, const Lead& lead, int64_t batch, int64_t T, int64_t t0, int64_t tokens,
                            int64_t K, int padded, float* out) {
  char* base = query.batch(lead, batch);
  for (int q = 0; q < Q; ++q) {
    const char* row = t0 + q < tokens ? token_row(query, lead, base, T, t0 + q) : nullptr;
    for (int c = int(threadIdx.x); c < padded; c += kThreads) {
      out[q * padded + c] = row != nullptr && c < K ? load(row, query.dtype, c) : 0.f;
    }
  }
}

}  // namespace mk::cuda
