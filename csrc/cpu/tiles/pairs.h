// Rows of bfloat16 for gemm_pairs(). Scores are products of the numbers given, exact but for the sum in float32; weights are summed
// before they are rounded to bfloat16.
#pragma once

#include "cpu/tiles/scores.h"

namespace mk::MK_ISA {

template <class F>
constexpr bool kHasPairs = MK_BYTES == 64 && sizeof(F) == 4;

// Are queries and keys multiplied as pairs?
template <class F>
bool are_pairs(DType query, const SlotView& keys, int64_t K) {
  return kHasPairs<F> && isa() == Isa::avx512bf16 && query == DType::bf16 && keys.dtype == DType::bf16 && K > 0 &&
         K % 2 == 0;
}

// Pairs of two columns of the rows of a block: as they lie, unless slots are left out or rows begin at odd places.
template <class F>
inline void pair_columns(const SlotBlock<F>& block, const typename Slots<F>::Source& source, int64_t first,
                         int64_t width, F* buffer, const F*& rows, int64_t& stride) {
  if (block.which == nullptr && source.stride % 4 == 0) {
    rows = reinterpret_cast<const F*>(source.row(first)), stride = source.stride / 4;
    return;
  }
  rows = buffer, stride = width / 2;
  for (int64_t j = 0; j < block.n; ++j)
    std::memcpy(buffer + j * stride, source.row(first + block.place(j)), size_t(width) * 2);
}

// Pairs of two rows, out[j][c] = (row 2 j, row 2 j + 1)[c], the last perhaps alone; rows of `stride` pairs, zeros behind the end.
template <class Row>
inline void pair_rows(int64_t rows, int64_t width, int64_t stride, float* out, Row&& row) {
  const auto number = [](const char* p, int64_t c) {
    uint16_t x;
    std::memcpy(&x, p + 2 * c, 2);
    return uint32_t(x);
  };
  for (int64_t j = 0; j < rows; j += 2, out += stride) {
    const bool alone = j + 1 == rows;
    const char *a = row(j), *b = alone ? a : row(j + 1);
    const uint32_t both = alone ? 0xffff : 0xffffffff;
    for (int64_t c = 0; c < width; ++c) out[c] = from_bits((number(a, c) | number(b, c) << 16) & both);
    for (int64_t c = width; c < stride; ++c) out[c] = 0;
  }
}

// Scores of many tokens, lanes are tokens: of numbers, or of pairs of two columns, queries [K / 2][lanes] and keys [slot][K / 2].
template <class F>
struct ColumnScores {
  const TokenRows& query;
  const Slots<F>& slots;
  int64_t K;
  F factor;
  bool pairs;

  void pack(int64_t t0, int64_t n, int64_t L, F* row, F* q) const {
    if constexpr (kHasPairs<F>) {
      const auto bits = [&](int64_t t, F*) { return reinterpret_cast<const F*>(query.row(t0 + t)); };
      if (pairs) return pack_lanes<F, true>(n, L, K / 2, F(1), nullptr, q, bits);
    }
    pack_query(query, t0, n, L, K, factor, row, q);
  }

  // A block of slots; of pairs its keys alone, as they lie unless slots are left out or rows begin at odd places.
  SlotBlock<F> load(int64_t first, int64_t count, const typename Slots<F>::Buffers& buffers) const {
    if (!pairs) return slots.load(first, count, buffers);
    SlotBlock<F> block = slots.list(first, count, buffers);
    pair_columns(block, slots.stored_keys(), first, K, buffers.keys, block.keys, block.ks);
    return block;
  }

  // As score_columns(). Queries of pairs have no factor in them: the products get it.
  template <class Between = Nothing>
  void scores(const SlotBlock<F>& block, const F* q, int64_t L, F* S, RowsAhead next, Between&& between = {}) const {
    if constexpr (kHasPairs<F>) {
      if (pairs) {
        for_groups(block.n, next, between, [&](int64_t r, int64_t count, int64_t ahead) {
          gemm_pairs(
              {count, L, K / 2, block.keys + r * block.ks, block.ks, 1, q, L, S + r * L, L, false, ahead * block.ks},
              factor);
        });
        return add_mask(block, L, S);
      }
    }
    score_columns(block, K, q, L, S, between, next);
  }
};

#if defined(__AVX512F__)
// S[slot][lanes] rounded in place, [slot][lanes / 2]: pairs of two tokens.
inline void pair_tokens(float* S, int64_t slots, int64_t L) {
  for (int64_t j = 0; j < slots; ++j) {
    for (int64_t l = 0; l < L; l += 2 * kLanes<float>) {
      const bool whole = l + kLanes<float> < L;
      const Vec<float> a = load<float>(S + j * L + l), b = whole ? load<float>(S + j * L + l + kLanes<float>) : a;
      const Vec<float> x = rounded(a, b);
      std::memcpy(S + (j * L + l) / 2, &x, whole ? sizeof x : sizeof x / 2);
    }
  }
}

// out[j][lane] = the pair of slots 2 j and 2 j + 1, the last perhaps alone.
inline void pair_slots(const float* S, int64_t slots, int64_t L, float* out) {
  for (int64_t j = 0; j < slots; j += 2, out += L) {
    for (int64_t l = 0; l < L; l += kLanes<float>) {
      const Vec<float> b = j + 1 < slots ? load<float>(S + (j + 1) * L + l) : fill<float>(0);
      store<float>(out + l, pairs_of(load<float>(S + j * L + l), b));
    }
  }
}
#endif

}  // namespace mk::MK_ISA
