// A few rows of a memory per token: one warp works on one token. `G` neighbouring lanes share a row, each takes packs of 16 bytes,
// so 32 / G rows are under way at once; they are added up by shuffles, in one fixed order. Rows that are not aligned are loaded
// number by number into the same places: the bits of a sum do not depend on where the memory lies.
#pragma once

#include "cuda/tiles/numbers.h"

namespace mk::cuda {

// Rows of one memory, of type X.
struct RowSource {
  const char* base;
  int64_t stride, count, width;
};

// How many neighbouring lanes share a row of `width` X.
template <class X>
MK_DEVICE int lanes_per_row(int64_t width) {
  int g = 1;
  while (g < 32 && g * Pack<X>::size < width) g *= 2;
  return g;
}

// The pack of columns that begins at `column`; zeros beyond the row's end. `aligned`: rows are made of whole packs.
template <class X, bool aligned>
MK_DEVICE void load_columns(const RowSource& s, int64_t row, int64_t column, float (&x)[Pack<X>::size]) {
  const X* from = reinterpret_cast<const X*>(s.base + row * s.stride) + column;
  if constexpr (aligned) {
    const auto pack = *reinterpret_cast<const Pack<X>*>(from);
#pragma unroll
    for (int e = 0; e < Pack<X>::size; ++e) x[e] = to_float(pack.x[e]);
  } else {
#pragma unroll
    for (int e = 0; e < Pack<X>::size; ++e) x[e] = column + e < s.width ? to_float(from[e]) : 0.f;
  }
}

// put(column, x) for sum_j weight(j) * row index(j), over j in [0, n) whose index is not -1. An index outside the memory makes the
// sum NaN. All lanes of a warp; weight(j) and index(j) are read, not computed.
template <class X, bool aligned, class Index, class Weight, class Put>
MK_DEVICE void sum_rows(const RowSource& s, int n, Index&& index, Weight&& weight, Put&& put) {
  constexpr int E = Pack<X>::size;
  const int lane = int(threadIdx.x) & 31, G = lanes_per_row<X>(s.width), group = lane / G, groups = 32 / G;
  for (int64_t c0 = 0; c0 < s.width; c0 += G * E) {
    const int64_t column = c0 + lane % G * E;
    float acc[E] = {};
#pragma unroll 4
    for (int j = group; j < n; j += groups) {
      const int64_t row = index(j);
      if (row == -1 || column >= s.width) continue;
      const bool inside = row >= 0 && row < s.count;
      const float w = inside ? weight(j) : __uint_as_float(0x7fc00000u);
      float x[E] = {};
      if (inside) load_columns<X, aligned>(s, row, column, x);
#pragma unroll
      for (int e = 0; e < E; ++e) acc[e] += w * x[e];
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
      for (int d = G; d < 32; d *= 2) acc[e] += __shfl_xor_sync(kAllLanes, acc[e], d);
      if (group == 0 && column + e < s.width) put(column + e, acc[e]);
    }
  }
}

// <row `row` of s, other>; every lane of the group that shares the row gets it. other(column) is a number.
template <class X, bool aligned, class Other>
MK_DEVICE float multiply_row(const RowSource& s, int64_t row, int G, Other&& other) {
  constexpr int E = Pack<X>::size;
  const int lane = int(threadIdx.x) & 31;
  float sum = 0;
  if (row >= 0 && row < s.count) {
    for (int64_t column = (lane % G) * E; column < s.width; column += G * E) {
      float x[E];
      load_columns<X, aligned>(s, row, column, x);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        if (aligned || column + e < s.width) sum += x[e] * other(column + e);
      }
    }
  }
  for (int d = 1; d < G; d *= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
  return sum;
}

}  // namespace mk::cuda
