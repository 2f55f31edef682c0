// Products of tiles in shared memory by the tensor cores: what a lane of a warp holds of them, for each type of number.
//
// A product has 16 rows on the left and 8 columns on the right; a step along its depth is 32 bytes of a row whatever the type, 16
// numbers of 16 bits or 8 of float32. Rows of a tile lie an odd number of 16 bytes apart, so that 8 of them, or 4 pairs, meet
// different banks.
//
// float32 is split into two tf32 numbers of 11 binary digits, x = high + low, and high high, high low and low high are added up: an
// error of about 2^-21 of a product. The hardware may cut sums off where a float addition would round, and 1000 steps cut in one
// direction; so small terms have a sum of their own, and a sum over many tiles is added up outside. An infinite float32 number has
// no low part and gives NaN.
#pragma once

#include "cuda/numbers.h"

namespace mk::cuda {

// The most tokens that share a memory and are not taken in tiles. A choice, not a measurement: of a tile of 64 tokens a quarter is
// used then, and a stream of 8 reads the memory twice.
constexpr int64_t kFew = 16;

// Names an arithmetic, as bf16, f16 and float do: float32 rounded to tf32, for products that end as 16-bit numbers.
struct tf32 {};

// The numbers in memory of an arithmetic.
template <class M>
using Stored = std::conditional_t<std::is_same_v<M, tf32>, float, M>;

// One step of the left side.
template <class M>
struct Left {
  uint32_t x[4];
};
template <>
struct Left<float> {
  uint32_t high[4], low[4];
};

// What a lane has of a product: x[0] and x[1] in row lane / 4, columns 2 (lane % 4) and the next; x[2] and x[3] 8 rows below.
template <class M>
struct Sums {
  float x[4] = {};
  MK_DEVICE float operator[](int i) const { return x[i]; }
};
template <>
struct Sums<float> {
  float x[4] = {}, low[4] = {};
  MK_DEVICE float operator[](int i) const { return x[i] + low[i]; }
};

constexpr uint32_t kHighDigits = 0xffffe000;  // of a float32 number, those that tf32 has

MK_DEVICE uint32_t low_part(uint32_t x) {
  return __float_as_uint(__uint_as_float(x) - __uint_as_float(x & kHighDigits)) & kHighDigits;
}

// From the numbers as they lie in memory.
template <class M>
MK_DEVICE Left<M> left_of(const uint32_t (&x)[4]) {
  Left<M> a;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<M, float>) a.high[i] = x[i] & kHighDigits, a.low[i] = low_part(x[i]);
    else if constexpr (std::is_same_v<M, tf32>) a.x[i] = tf32_nearest(__uint_as_float(x[i]));
    else a.x[i] = x[i];
  }
  return a;
}

// One step of a product; b0 and b1 as they lie in memory.
MK_DEVICE void add_product(Sums<bf16>& d, const Left<bf16>& a, uint32_t b0, uint32_t b1) { mma_bf16(d.x, a.x, b0, b1); }
MK_DEVICE void add_product(Sums<f16>& d, const Left<f16>& a, uint32_t b0, uint32_t b1) { mma_f16(d.x, a.x, b0, b1); }
MK_DEVICE void add_product(Sums<tf32>& d, const Left<tf32>& a, uint32_t b0, uint32_t b1) {
  mma_tf32(d.x, a.x, tf32_nearest(__uint_as_float(b0)), tf32_nearest(__uint_as_float(b1)));
}
MK_DEVICE void add_product(Sums<float>& d, const Left<float>& a, uint32_t b0, uint32_t b1) {
  const uint32_t high0 = b0 & kHighDigits, high1 = b1 & kHighDigits;
  mma_tf32(d.low, a.low, high0, high1);
  mma_tf32(d.low, a.high, low_part(b0), low_part(b1));
  mma_tf32(d.x, a.high, high0, high1);
}

// Bytes from row to row of a tile so wide. Rows are filled up with zeros to whole steps of 16 numbers.
template <class X>
MK_BOTH constexpr int tile_pitch(int64_t columns) {
  return int((columns + 15) / 16 * 16 * int64_t(sizeof(X))) + 16;
}

// 16 rows as the left side, from byte `at` of each. `lane`, here and below: of this thread, in its warp.
MK_DEVICE void load_left(uint32_t (&x)[4], const char* rows, int pitch, int at, int lane) {
  ldmatrix(x, rows + lane % 16 * pitch + lane / 16 * 16 + at);
}

// 16 rows as columns of the right side, from byte `at` of each: b0 and b1 of the first 8, then of the others.
MK_DEVICE void load_columns(uint32_t (&b)[4], const char* rows, int pitch, int at, int lane) {
  ldmatrix(b, rows + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 16 + at);
}

// The rows of one step as the depth of the right side, 16 columns from `column` on: b0 and b1 of the first 8, then of the others.
// For float32 place k of the depth is row 2 k, from k = 4 on row 2 k - 7: the order in which weights_left() has its columns.
template <class W>
MK_DEVICE void load_depth(uint32_t (&b)[4], const char* rows, int pitch, int column, int lane) {
  if constexpr (sizeof(W) == 2) {
    ldmatrix_transposed(b, rows + lane % 16 * pitch + lane / 16 * 16 + column * 2);
  } else {
    const auto* x = reinterpret_cast<const uint32_t*>(rows + lane % 4 * 2 * pitch) + column + lane / 4;
    b[0] = x[0], b[2] = x[8];
    x += pitch / 4;
    b[1] = x[0], b[3] = x[8];
  }
}

// Step `step` of the left side, from a product with its columns as depth: [8 columns each][x of Sums].
template <class M>
MK_DEVICE Left<M> weights_left(const float (*x)[4], int step) {
  if constexpr (std::is_same_v<M, float> || std::is_same_v<M, tf32>) {
    const float(&p)[4] = x[step];
    return left_of<M>({__float_as_uint(p[0]), __float_as_uint(p[2]), __float_as_uint(p[1]), __float_as_uint(p[3])});
  } else {
    const float(&p)[4] = x[2 * step], (&n)[4] = x[2 * step + 1];
    auto pair = [](float low, float high) {
      return std::is_same_v<M, bf16> ? bf16_pair(low, high) : half_pair(low, high);
    };
    return {{pair(p[0], p[1]), pair(p[2], p[3]), pair(n[0], n[1]), pair(n[2], n[3])}};
  }
}

// All threads: starts the copy of rows into a tile, in packs of 16 bytes where `packs`; zeros beyond `columns` and where
// row_of(row) is null. Eight threads share a row; `tid` is this one. `base`: any address of the memory. The caller commits.
template <class X, int threads, class Row>
MK_DEVICE void copy_rows(int tid, int rows, int64_t columns, bool packs, const char* base, char* tile, int pitch,
                         Row&& row_of) {
  constexpr int E = Pack<X>::size;
  const int whole = pitch / 16 - 1;
  for (int row = tid / 8; row < rows; row += threads / 8) {
    const char* from = row_of(row);
    for (int c = tid % 8; c < whole; c += 8) {
      char* to = tile + row * pitch + c * 16;
      if (packs) {
        const bool there = from != nullptr && c * E < columns;
        copy16(to, there ? from + c * 16 : base, there);
        continue;
      }
      Pack<X> pack;
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const int column = c * E + e;
        const bool there = from != nullptr && column < columns;
        pack.x[e] = there ? reinterpret_cast<const X*>(from)[column] : from_float<X>(0.f);
      }
      *reinterpret_cast<Pack<X>*>(to) = pack;
    }
  }
}

// The same for rows of a 16-bit type that become float32; what is written is there after the next barrier.
template <class X, int threads, class Row>
MK_DEVICE void widen_rows(int tid, int rows, int64_t columns, char* tile, int pitch, Row&& row_of) {
  const int whole = pitch / 4 - 4;
  for (int row = tid / 8; row < rows; row += threads / 8) {
    const auto* from = reinterpret_cast<const X*>(row_of(row));
    auto* to = reinterpret_cast<float*>(tile + row * pitch);
    for (int c = tid % 8; c < whole; c += 8) {
      to[c] = from != nullptr && c < columns ? to_float(from[c]) : 0.f;
    }
  }
}

}  // namespace mk::cuda
