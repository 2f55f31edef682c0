// Rows of bfloat16 for gemm_pairs(). Scores are products of the numbers given, exact but for the sum in float32; weights are rounded
// to bfloat16, whose sum is that of the weights before.
#pragma once

#include "common/scores.h"

namespace mk::MK_ISA {

// What the products of a kernel are of.
enum class Of { numbers, pairs };

template <class F>
constexpr bool kHasPairs = MK_BYTES == 64 && sizeof(F) == 4;

// Are queries and keys multiplied as pairs?
template <class F>
bool are_pairs(DType query, const SlotView& keys, int64_t K) {
  return kHasPairs<F> && isa() == Isa::avx512bf16 && query == DType::bf16 && keys.dtype == DType::bf16 && K > 0 &&
         K % 2 == 0;
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
    const auto& key = slots.stored_keys();
    if (block.which == nullptr && key.stride % 4 == 0) {
      block.keys = reinterpret_cast<const F*>(key.row(first)), block.ks = key.stride / 4;
      return block;
    }
    block.keys = buffers.keys, block.ks = K / 2;
    for (int64_t j = 0; j < block.n; ++j)
      std::memcpy(buffers.keys + j * block.ks, key.row(first + block.place(j)), size_t(K) * 2);
    return block;
  }

  // As score_columns(). Queries of pairs have no factor in them: the products get it.
  template <class Between = Nothing>
  void scores(const SlotBlock<F>& block, const F* q, int64_t L, F* S, int64_t ahead, Between&& between = {}) const {
    if constexpr (kHasPairs<F>) {
      if (pairs) {
        for (int64_t r = 0; r < block.n; r += kGroup, between()) {
          gemm_pairs({least(kGroup, block.n - r), L, K / 2, block.keys + r * block.ks, block.ks, 1, q, L, S + r * L, L,
                      false, ahead * block.ks},
                     factor);
        }
        return add_mask(block, L, S);
      }
    }
    score_columns(block, K, q, L, S, between, ahead);
  }
};

// Pairs of two slots, out[j][v] = (row 2 j, row 2 j + 1)[v]; the last may be alone.
inline void pair_values(const SlotBlock<float>& block, const Slots<float>::Source& value, int64_t first, int64_t V,
                        float* out) {
  const auto number = [](const char* row, int64_t v) {
    uint16_t x;
    std::memcpy(&x, row + 2 * v, 2);
    return uint32_t(x);
  };
  for (int64_t j = 0; j < block.n; j += 2, out += V) {
    const char* a = value.row(first + block.place(j));
    const bool alone = j + 1 == block.n;
    const char* b = alone ? a : value.row(first + block.place(j + 1));
    const uint32_t both = alone ? 0xffff : 0xffffffff;
    for (int64_t v = 0; v < V; ++v) out[v] = from_bits((number(a, v) | number(b, v) << 16) & both);
  }
}

}  // namespace mk::MK_ISA
