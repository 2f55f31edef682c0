// Rows of bfloat16 for gemm_pairs(). Scores are products of the numbers given, exact but for the sum in float32; weights are rounded
// to bfloat16, whose sum is that of the weights before.
#pragma once

#include "common/slots.h"

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

// Pairs of two columns, [slot][K / 2], `stride` from row to row: keys as they lie, unless slots are left out or rows begin at odd places.
inline const float* pair_keys(const SlotBlock<float>& block, const Slots<float>::Source& key, int64_t first, int64_t K,
                              float* buffer, int64_t& stride) {
  stride = key.stride / 4;
  if (block.which == nullptr && key.stride % 4 == 0) return reinterpret_cast<const float*>(key.row(first));
  stride = K / 2;
  for (int64_t j = 0; j < block.n; ++j)
    std::memcpy(buffer + j * stride, key.row(first + block.place(j)), size_t(K) * 2);
  return buffer;
}

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
