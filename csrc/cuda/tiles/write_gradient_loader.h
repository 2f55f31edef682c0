// Loads the rows of a block of the gradients of a write. Rows of this side are loaded once; if they are too wide for
// shared memory, again with every tile. Rows of the other side are loaded tile by tile, in parts of 128 columns that
// alternate between two buffers: each part is prefetched while the part before it is multiplied. The part that is
// summed comes last, because it is used twice: along its columns for the scores, along its rows for the sum.
#pragma once

#include "cuda/tiles/buffers.h"
#include "cuda/tiles/write_gradient_rows.h"

namespace mk::cuda {
namespace {

template <class M, bool by_slots>
struct Loader {
  using X = Stored<M>;
  static constexpr int S = kOthers<X>;

  const Tiling& r;
  Shared<S, by_slots>& block;
  Buffers buffers;
  char *keyed, *valued;  // rows of this side that stay: [64, K] and [64, V]
  bool given = bool(r.w.pairs.weights);
  // A tile has parts of rows with V columns, then parts of rows with K columns; for dw parts with K columns, then the
  // part with V columns that is summed.
  int before = r.of == Of::write ? 0 : r.value_parts;
  int parts = before + r.key_parts + (r.of == Of::write ? 1 : 0);
  int64_t other = 0, following = 0;  // where this tile and the next one begin; from the end of the range on: no tile
  int n = 0;                         // which of two places in shared memory this tile has

  // The first tile from `from` on with a suffix product above 0 for a row of this block, or the end of the range.
  // Of::maps computes them, so it takes every tile. All warps get the same result.
  MK_DEVICE int64_t next(int64_t from) const {
    if (r.of == Of::maps) return from;
    const int64_t N = r.w.pairs.N;
    const int lane = opaque(int(threadIdx.x)) % 32;
    const int* firsts = r.firsts + block.batch * N;
    for (; from < block.end; from += S) {
      bool traced = false;
      if constexpr (by_slots) {
        for (int64_t i = block.row0 + lane; i < least(N, block.row0 + kRows); i += 32) {
          traced = traced || firsts[i] < (from + S) / kBorder;
        }
      } else {
        const int64_t i = from + lane;
        traced = lane < S && i < N && firsts[i] < (block.row0 + kRows) / kBorder;
      }
      if (__any_sync(kAllLanes, traced)) break;
    }
    return from;
  }

  // Finds the first tile and looks it up, then starts copying the rows of this side and the first part.
  MK_DEVICE void start() {
    other = following = next(block.begin);
    if (other < block.end) look_up(block, r, 0, other);
    __syncthreads();
    if (r.held) prefetch_own();
    if (other < block.end) prefetch(other, 0, 0);
  }

  MK_DEVICE void advance() { other = following, n ^= 1; }

  MK_DEVICE bool is_valued(int part) const { return part < before || part >= before + r.key_parts; }

  // The first column of a part. Of the parts with K columns, the one that is summed comes last.
  MK_DEVICE int64_t column_of(int part) const {
    if (is_valued(part)) return int64_t(r.of == Of::write ? block.block : part) * kColumns;
    const int k = part - before + (r.of == Of::keys || r.of == Of::query ? 1 + block.block : 0);
    return int64_t(k < r.key_parts ? k : k - r.key_parts) * kColumns;
  }

  MK_DEVICE const char* own_row(bool of_values, int i) const {
    if constexpr (by_slots) return of_values ? block.slots[0].upper[i] : block.slots[0].keys[i];
    else return of_values ? block.tokens[0].write[i] : block.tokens[0].query[i];
  }

  MK_DEVICE void prefetch_own() const {
    const Pairs& p = r.w.pairs;
    for (int v = 0; v < 2; ++v) {
      if (v == 0 ? given : before == 0) continue;
      start_rows<X>(int(threadIdx.x), kRows, r.views, v == 0 ? r.own_keyed : r.own_valued, 0, v == 0 ? p.K : p.V,
                    v == 0 ? keyed : valued, v == 0 ? r.key_pitch : r.value_pitch,
                    [&](int i) { return own_row(v != 0, i); });
    }
  }

  // Starts the copy of part `part` of the tile at `other`, looked up in place n: [S, 128], and of rows of this side
  // [64, 128] if they do not stay. Given gates are rows of tokens: [S, 64], or [64, S] if tokens are this side.
  MK_DEVICE void prefetch(int64_t other, int n, int part) {
    const int tid = opaque(int(threadIdx.x));
    const bool values = is_valued(part);
    char* buffer = buffers.next();
    const int64_t at = column_of(part);
    const int step = values ? r.value_step : r.key_step;
    if (given && !values) {
      if constexpr (by_slots) {
        start_rows<X>(tid, S, r.views, r.gates, block.row0, kRows, buffer, r.gate_step,
                      [&](int i) { return block.tokens[n].query[i]; });
      } else {
        start_rows<X>(tid, kRows, r.views, r.gates, other, S, buffer, r.gate_step,
                      [&](int i) { return block.tokens[0].query[i]; });
      }
    } else {
      start_rows<X>(tid, S, r.views, values ? r.valued : r.keyed, at, kColumns, buffer, step,
                    [&](int i) -> const char* {
                      if constexpr (by_slots) return values ? block.tokens[n].write[i] : block.tokens[n].query[i];
                      else return values ? block.slots[n].upper[i] : block.slots[n].keys[i];
                    });
      if (!r.held) {
        start_rows<X>(tid, kRows, r.views, values ? r.own_valued : r.own_keyed, at, kColumns, buffer + S * step, step,
                      [&](int i) { return own_row(values, i); });
      }
    }
    commit_copies();
  }

  // Waits for part `part` of this tile, and prefetches the one after it.
  MK_DEVICE const char* arrived(int part) {
    const char* here = buffers.arrived();
    if (part == 0) {
      following = next(other + S);
      if (following < block.end) look_up(block, r, n ^ 1, following);
    }
    const bool last = part + 1 == parts;
    if (!last || following < block.end) prefetch(last ? following : other, last ? n ^ 1 : n, last ? 0 : part + 1);
    return here;
  }
};

}  // namespace
}  // namespace mk::cuda
