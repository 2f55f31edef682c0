// Rows that lie scattered in memory: their weighted sum and their products with a vector, of any dtype, converted on
// load.
//
// Several rows must be in flight at once, or every row costs a whole memory latency: while row j is summed, row j +
// kAhead is prefetched. That is why rows come as a flat list of pointers that goes on past the row in hand. Prefetched
// into L2, which can wait for more lines than L1: 6 rows ahead into L1 sparse_read N=2^20 V=256 T=4096 takes 13.5 ms, 12, 16
// or 24 ahead into L2 11.0. Rows in order of slot, for the page tables' sake, cost more than they saved.
#pragma once

#include "cpu/tiles/parallel.h"
#include "cpu/tiles/rows.h"

namespace mk::MK_ISA {

constexpr int64_t kAhead = 16;

// A sum takes so many rows at a time, and adds what they made: added to row by row, it would stop at 2^24 equal terms.
constexpr int64_t kTerms = 4096;

// Rows with weights, in the order in which they will be used. Room for `capacity` and the pointers that prefetching
// runs into.
template <class F>
struct RowList {
  const char** rows;
  F* weights;
  int64_t n = 0;

  static RowList take(Arena& arena, int64_t capacity) {
    return {arena.take<const char*>(capacity + kAhead), arena.take<F>(capacity)};
  }
  void push(const char* row, F weight) {
    rows[n] = row;
    weights[n++] = weight;
  }
  void close() {
    for (int64_t i = 0; i < kAhead; ++i) rows[n + i] = n == 0 ? nullptr : rows[n - 1];
  }
};

// out[0..width) = sum_{j < n} weights[j] * rows[j]; out has room for whole registers. out[j] = <rows[j], x> for j < n; x is padded
// with zeros to whole registers. The list must go on for kAhead rows.
void weighted_sum(DType dtype, const char* const* rows, const float* weights, int64_t n, int64_t width, float* out);
void row_products(DType dtype, const char* const* rows, int64_t n, int64_t width, const float* x, float* out);
void weighted_sum(DType dtype, const char* const* rows, const double* weights, int64_t n, int64_t width, double* out);
void row_products(DType dtype, const char* const* rows, int64_t n, int64_t width, const double* x, double* out);

}  // namespace mk::MK_ISA
