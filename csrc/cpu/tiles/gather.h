// Rows scattered in memory, of any dtype, converted at load: their weighted sum, and their products with a vector.
//
// Several rows must be in flight at once, or every row costs a whole memory latency: while row j is summed, row
// j + kAhead is prefetched. So rows are a flat list of pointers that continues beyond the current row. Prefetch goes
// into L2, which can wait for more cache lines than L1. sparse_read N=2^20 V=256 T=4096: 13.5 ms with 6 rows ahead into
// L1, 11.0 with 12, 16 or 24 ahead into L2. Sorting rows by slot, for the sake of the TLB, cost more than it saved.
#pragma once

#include "cpu/tiles/parallel.h"
#include "cpu/tiles/rows.h"

namespace mk::MK_ISA {

constexpr int64_t kAhead = 16;

// A sum takes so many rows at a time and adds up their partial sums. A float sum that grows row by row stops changing
// at 2^24 equal terms.
constexpr int64_t kTerms = 4096;

// Rows with weights, in order of use. Room for `capacity` rows and for the pointers that prefetch reads beyond them.
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

// weighted_sum: out[0..width) = sum_{j < n} weights[j] * rows[j]; out has room for whole registers. row_products:
// out[j] = <rows[j], x> for j < n; x is padded with zeros to whole registers. The list must have kAhead more pointers.
void weighted_sum(DType dtype, const char* const* rows, const float* weights, int64_t n, int64_t width, float* out);
void row_products(DType dtype, const char* const* rows, int64_t n, int64_t width, const float* x, float* out);
void weighted_sum(DType dtype, const char* const* rows, const double* weights, int64_t n, int64_t width, double* out);
void row_products(DType dtype, const char* const* rows, int64_t n, int64_t width, const double* x, double* out);

// Rows that a cache holds, by their numbers, k for each token; -1 is left out. Without a list of pointers, and without
// prefetch.
struct NamedRows {
  DType dtype;
  const char* base;
  int64_t stride;  // bytes from row to row
  int64_t tokens, k;
  const int64_t* index;  // [tokens, k]
};
// out[t][0..width) = sum_j weights[t][j] * row of index[t][j]; the last row of `out` has room for whole registers.
void weighted_sums(const NamedRows& rows, const float* weights, int64_t width, float* out);
void weighted_sums(const NamedRows& rows, const double* weights, int64_t width, double* out);

}  // namespace mk::MK_ISA
