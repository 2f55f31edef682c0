// Products of tiles in shared memory on the tensor cores: the fragments that a lane holds, for each type of number.
//
// A product has 16 rows on the left and 8 columns on the right. A step along its depth is 32 bytes of a row for every
// type: 16 numbers of 16 bits, or 8 of float32. The pitch of the rows of a tile is an odd multiple of 16 bytes, so that
// 8 rows, or 4 pairs of them, use different banks.
//
// float32 is split into two tf32 numbers of 11 binary digits, x = high + low. The products high high, high low and low
// high are summed: an error of about 2^-21 of a product. The hardware may truncate sums where float addition would
// round, and 1000 truncated steps err in one direction. So small terms have a sum of their own, and a sum over many
// tiles is added up outside. An infinite float32 number has no low part and gives NaN.
#pragma once

#include "cuda/tiles/numbers.h"

namespace mk::cuda {

// With at most so many tokens per memory, tiles are not used. A choice, not a measurement: a quarter of a tile of 64
// tokens would be used, and the streams of 8 tokens read the memory twice.
constexpr int64_t kFew = 16;

// Names an arithmetic, like bf16, f16 and float do: float32 rounded to tf32, for products that are stored in 16 bits.
struct tf32 {};

// The type in memory of an arithmetic's numbers.
template <class M>
using Stored = std::conditional_t<std::is_same_v<M, tf32>, float, M>;

// The left operand of one step.
template <class M>
struct Left {
  uint32_t x[4];
};
template <>
struct Left<float> {
  uint32_t high[4], low[4];
};

// A lane's part of a product: x[0] and x[1] are in row lane / 4, columns 2 (lane % 4) and the next; x[2] and x[3] 8
// rows below.
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

constexpr uint32_t kHighDigits = 0xffffe000;  // the bits of a float32 number that tf32 keeps

MK_DEVICE uint32_t low_part(uint32_t x) {
  return __float_as_uint(__uint_as_float(x) - __uint_as_float(x & kHighDigits)) & kHighDigits;
}

// From numbers as they are in memory.
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

// One step of a product; b0 and b1 as they are in memory.
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

// The pitch in bytes of a tile with rows of this width. Rows are padded with zeros to whole steps of 16 numbers.
template <class X>
MK_BOTH constexpr int tile_pitch(int64_t columns) {
  return int((columns + 15) / 16 * 16 * int64_t(sizeof(X))) + 16;
}

// 16 rows as the left operand, from byte `at` of each. `lane`, here and below: of this thread, in its warp.
MK_DEVICE void load_left(uint32_t (&x)[4], const char* rows, int pitch, int at, int lane) {
  ldmatrix(x, rows + lane % 16 * pitch + lane / 16 * 16 + at);
}

// 16 rows as columns of the right operand, from byte `at` of each: b0 and b1 of the first 8, then of the others.
MK_DEVICE void load_columns(uint32_t (&b)[4], const char* rows, int pitch, int at, int lane) {
  ldmatrix(b, rows + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 16 + at);
}

// The rows of one step as the depth of the right operand, 16 columns from `column` on: b0 and b1 of the first 8, then
// of the others. For float32 the depth is permuted: index k is row 2 k, from k = 4 on row 2 k - 7, like the columns of
// weights_left().
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

// Step `step` of the left operand, whose depth are the columns of a product: [8 columns each][x of Sums].
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

// All threads: starts copies of rows into a tile, in packs of 16 bytes if `packs`. Writes zeros beyond `columns` and
// where row_of(row) is null. Eight threads share a row; `tid` is this thread. `base`: any address in the memory. The
// caller commits.
template <class X, int threads, class Row>
MK_DEVICE void copy_rows(int tid, int rows, int64_t columns, bool packs, const char* base, char* tile, int pitch,
                         Row&& row_of) {
  constexpr int E = Pack<X>::size;
  const int whole = pitch / 16 - 1;
  for (int row = tid / 8; row < rows; row += threads / 8) {
    const char* from = row_of(row);
    char* to = tile + row * pitch;
    if (packs) {
      for (int c = tid % 8; c < whole; c += 8) {
        const bool there = from != nullptr && c * E < columns;
        copy16(to + c * 16, there ? from + c * 16 : base, there);
      }
      continue;
    }
#pragma unroll 1
    for (int c = tid % 8; c < whole; c += 8) {
      Pack<X> pack;
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const int column = c * E + e;
        const bool there = from != nullptr && column < columns;
        pack.x[e] = there ? reinterpret_cast<const X*>(from)[column] : from_float<X>(0.f);
      }
      *reinterpret_cast<Pack<X>*>(to + c * 16) = pack;
    }
  }
}

// The same for rows of another type, converted to float32. The next barrier makes what is written visible.
template <int threads, class Row>
MK_DEVICE void widen_rows(int tid, DType from_type, int rows, int64_t columns, char* tile, int pitch, Row&& row_of) {
  const int whole = pitch / 4 - 4;
  for (int row = tid / 8; row < rows; row += threads / 8) {
    const char* from = row_of(row);
    auto* to = reinterpret_cast<float*>(tile + row * pitch);
#pragma unroll 1
    for (int c = tid % 8; c < whole; c += 8) to[c] = from != nullptr && c < columns ? load(from, from_type, c) : 0.f;
  }
}

// sums += one step of the left side times 32 bytes of the S rows of a tile as columns.
template <class M, int S>
MK_DEVICE void add_step(Sums<M> (&sums)[S / 8], const Left<M>& a, const char* tile, int pitch, int step, int lane) {
#pragma unroll
  for (int j = 0; j < S / 16; ++j) {
    uint32_t b[4];
    load_columns(b, tile + j * 16 * pitch, pitch, step * 32, lane);
    add_product(sums[2 * j], a, b[0], b[1]);
    add_product(sums[2 * j + 1], a, b[2], b[3]);
  }
}

// sums += 16 rows on the left, from byte `at` of each, times the S rows of a tile as columns, `bytes` of each.
template <class M, int S>
MK_DEVICE void add_products(Sums<M> (&sums)[S / 8], const char* left, int left_pitch, int at, const char* tile,
                            int pitch, int bytes) {
  const int lane = opaque(int(threadIdx.x)) % 32;
  for (int step = 0; step * 32 < bytes; ++step) {
    uint32_t x[4];
    load_left(x, left, left_pitch, at + step * 32, lane);
    add_step<M, S>(sums, left_of<M>(x), tile, pitch, step, lane);
  }
}

// The power of two that scales `x`, the largest of its row, to about 2^14; 1 if x is not finite. Its inverse is a
// normal number.
MK_DEVICE float lift_of(float x) {
  const int exponent = int(__float_as_uint(x) >> 23 & 0xff), e = 268 - exponent;
  return exponent == 0xff ? 1.f : __uint_as_float(uint32_t(e < 253 ? e : 253) << 23);
}

// Scales each row of x to about 2^14 by a power of two; `drop` receives the inverses. Only for float16: the other types
// have the exponent range of float32.
template <class M, int S>
MK_DEVICE void lift_rows(float (&x)[S / 8][4], float (&drop)[2]) {
  drop[0] = drop[1] = 1;
  if constexpr (std::is_same_v<M, f16>) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float top = 0;
#pragma unroll
      for (int j = 0; j < S / 8; ++j) top = fmaxf(top, fmaxf(fabsf(x[j][2 * row]), fabsf(x[j][2 * row + 1])));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float lift = lift_of(top);
      drop[row] = 1 / lift;
#pragma unroll
      for (int j = 0; j < S / 8; ++j) x[j][2 * row] *= lift, x[j][2 * row + 1] *= lift;
    }
  }
}

// One of the two numbers that the lane `from` holds in register `i` of a step of weights_left(), or the only one.
MK_DEVICE float weight_of_lane(const Left<bf16>& a, int i, int from, int which) {
  return to_float(bf16{uint16_t(__shfl_sync(kAllLanes, a.x[i], from) >> 16 * which)});
}
MK_DEVICE float weight_of_lane(const Left<f16>& a, int i, int from, int which) {
  return to_float(f16{uint16_t(__shfl_sync(kAllLanes, a.x[i], from) >> 16 * which)});
}
MK_DEVICE float weight_of_lane(const Left<tf32>& a, int i, int from, int) {
  return __uint_as_float(__shfl_sync(kAllLanes, a.x[i], from));
}
MK_DEVICE float weight_of_lane(const Left<float>& a, int i, int from, int) {
  return __uint_as_float(__shfl_sync(kAllLanes, a.high[i], from)) +
         __uint_as_float(__shfl_sync(kAllLanes, a.low[i], from));
}

// If some of the sums of 16 columns from `column` on are not finite: the sums again, number by number, without the rows
// of the tile that do not count, whatever they hold. inside(row, j): does row j of the tile count in the sum of this
// lane's row 0 or 1? All lanes.
template <class M, int kSteps, class Inside>
MK_DEVICE void sum_inside(Sums<M> (&sums)[2], const Left<M> (&weights)[kSteps], const char* tile, int pitch, int column,
                          int lane, Inside&& inside) {
  using X = Stored<M>;
  constexpr int kPairs = sizeof(X) == 2 ? 2 : 1;  // numbers of a register
  bool strange = false;
#pragma unroll
  for (int i = 0; i < 8; ++i) strange |= !is_finite(sums[i / 4][i % 4]);
  if (!__any_sync(kAllLanes, strange)) return;
  sums[0] = sums[1] = {};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll 1
      for (int other = 0; other < 4; ++other) {
#pragma unroll
        for (int which = 0; which < kPairs; ++which) {
          const float weight = weight_of_lane(weights[step], i, lane / 4 * 4 + other, which);
          const int depth = kPairs == 2 ? i / 2 * 8 + other * 2 + which : other * 2 + i / 2;
          const int j = step * 8 * kPairs + depth, row = i % 2;
          if (!inside(row, j)) continue;
          const auto* from = reinterpret_cast<const X*>(tile + j * pitch) + column + lane % 4 * 2;
#pragma unroll
          for (int k = 0; k < 4; ++k) sums[k / 2].x[2 * row + k % 2] += weight * to_float(from[k / 2 * 8 + k % 2]);
        }
      }
    }
  }
}

// acc += weights times the rows of a tile; columns from `columns` on are left out. The tile has as many rows as the
// weights have columns. `lane`: see opaque(). check(sums, column): called with the sums of 16 columns.
template <class M, int kSteps, int kColumns, class Check>
MK_DEVICE void add_weighted(float (&acc)[kColumns / 8][4], const Left<M> (&weights)[kSteps], const float (&drop)[2],
                            const char* tile, int pitch, int64_t columns, int lane, Check&& check) {
  using X = Stored<M>;
  constexpr int kDepth = 32 / int(sizeof(X));  // rows of one step
#pragma unroll
  for (int c = 0; c < kColumns / 16; ++c) {
    if (c * 16 >= columns) break;
    Sums<M> sums[2];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t b[4];
      load_depth<X>(b, tile + step * kDepth * pitch, pitch, c * 16, lane);
      add_product(sums[0], weights[step], b[0], b[1]);
      add_product(sums[1], weights[step], b[2], b[3]);
    }
    check(sums, c * 16);
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[2 * c + i / 4][i % 4] += sums[i / 4][i % 4] * drop[i % 4 / 2];
  }
}
template <class M, int kSteps, int kColumns>
MK_DEVICE void add_weighted(float (&acc)[kColumns / 8][4], const Left<M> (&weights)[kSteps], const float (&drop)[2],
                            const char* tile, int pitch, int64_t columns, int lane) {
  add_weighted<M, kSteps, kColumns>(acc, weights, drop, tile, pitch, columns, lane, [](Sums<M>(&)[2], int) {});
}

}  // namespace mk::cuda
