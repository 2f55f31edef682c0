// Odd rows, which hold a number that is not finite, in products over slots that not all tokens may address.
//
// A weight of zero is not enough beside such a number, since 0 * NaN is NaN. So in a product over a border block
// (ranges.h) odd rows count as zeros, and what they add is added afterwards, to the tokens that may address them. The
// other rows go through the same product in the same order with or without odd rows beside them. So what a slot
// outside of a token's range holds changes no bit of the token's results.
#pragma once

#include <algorithm>

#include "cpu/tiles/pairs.h"
#include "cpu/tiles/ranges.h"

namespace mk::MK_ISA {

// Are x[0..n) finite numbers?
template <class F>
MK_INLINE bool all_finite(const F* x, int64_t n) {
  constexpr int W = kLanes<F>;
  Vec<F> wrong = fill<F>(0);
  int64_t i = 0;
  for (; i + W <= n; i += W) wrong += load<F>(x + i) - load<F>(x + i);
  F rest = 0;
  for (; i < n; ++i) rest += x[i] - x[i];
  return rest == 0 && !any<F>(wrong != fill<F>(0));
}

// The rows of a block that hold numbers that are not finite.
struct OddRows {
  int64_t n = 0;
  uint8_t row[kSlotBlock];

  // row(j): row j, `width` numbers.
  template <class F, class Row>
  static OddRows find(int64_t rows, int64_t width, Row&& row) {
    OddRows odd;
    for (int64_t j = 0; j < rows; ++j) {
      const F* x = row(j);
      if (!all_finite(x, width)) odd.row[odd.n++] = uint8_t(j);
    }
    return odd;
  }
};

// Copies rows [n][width] with those of `odd` zero.
template <class F>
inline void copy_finite(const F* rows, int64_t stride, int64_t n, int64_t width, const OddRows& odd, F* out,
                        int64_t out_stride) {
  for (int64_t j = 0; j < n; ++j) std::copy_n(rows + j * stride, width, out + j * out_stride);
  for (int64_t i = 0; i < odd.n; ++i) std::fill_n(out + odd.row[i] * out_stride, width, F(0));
}

// Zeroes row j of rows of pairs of two rows.
inline void zero_pair(float* rows, int64_t stride, int64_t width, int64_t j) {
  for (int64_t c = 0; c < width; ++c) {
    float& x = rows[j / 2 * stride + c];
    x = from_bits(to_bits(x) & (j % 2 == 0 ? 0xffff0000u : 0x0000ffffu));
  }
}
// One number of a pair of bfloat16.
inline float of_pair(float pair, int64_t j) {
  return from_bits(j % 2 == 0 ? to_bits(pair) << 16 : to_bits(pair) & 0xffff0000u);
}

// Is row t of rows [n][width] finite, or of pairs [n / 2][width] of rows? No rows are.
template <class F>
inline bool finite_row(const F* rows, int64_t t, int64_t width, [[maybe_unused]] bool pairs) {
  if (rows == nullptr) return true;
  if constexpr (kHasPairs<F>) {
    if (pairs) {
      const F* row = rows + t / 2 * width;
      const uint32_t exponent = t % 2 == 0 ? 0x00007f80u : 0x7f800000u;
      bool odd = false;
      for (int64_t c = 0; c < width; ++c) odd |= (to_bits(row[c]) & exponent) == exponent;
      return !odd;
    }
  }
  return all_finite(rows + t * width, width);
}

}  // namespace mk::MK_ISA
