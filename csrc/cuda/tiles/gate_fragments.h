// Shared by the writes in tiles, forward and backward: gates from the scores of tokens and slots, for products on the
// tensor cores. A warp has 16 rows of a tile of pairs, as the fragments of fragments.h.
//
// All operands of a call have one type in shared memory. If they differ (a float32 memory with 16-bit keys), or are
// float32, they are multiplied as float32, so that a float32 memory keeps its precision.
#pragma once

#include "cuda/tiles/fragments.h"
#include "cuda/tiles/gates.h"

namespace mk::cuda {
namespace {

constexpr int kThreads = 128, kRows = 64, kColumns = 128;
constexpr int kPartBytes = 256;  // per row, for rows that are loaded in parts

template <class X>
constexpr DType kTypeOf = std::is_same_v<X, bf16>  ? DType::bf16
                          : std::is_same_v<X, f16> ? DType::f16
                                                   : DType::f32;

// Tensors whose rows a block looks up. The address of its batch in each is computed once, by one thread per tensor, and
// kept in shared memory.
enum Tensor : int8_t { kQuery, kWrite, kTokenMask, kKeys, kMask, kUpper, kRetained, kDRetained, kTensors };
struct Views {
  View of[kTensors];
};
struct Bases {
  char* of[kTensors];
};

inline Views views_of(const Writing& w) {
  const Pairs& p = w.pairs;
  return {{p.weights ? p.weights : p.query, w.write, w.token_mask, p.keys, p.mask, {}, {}, {}}};
}
MK_DEVICE void find_bases(Bases& bases, const Views& views, const Lead& lead, int64_t batch) {
  const int i = int(threadIdx.x);
  if (i < kTensors) bases.of[i] = views.of[i] ? views.of[i].batch(lead, batch) : nullptr;
}

// Rows that are copied to shared memory.
struct Rows {
  Tensor of;
  bool packs;
  int64_t width;
};
inline Rows rows_of(const Views& views, Tensor of, const Lead& lead, int64_t width) {
  const View& v = views.of[of];
  return {of, v && width > 0 && in_packs(v, lead, width), width};
}

// All threads: starts copies of columns [at, at + columns) of rows to a tile, zeros where row_of(row) is null.
template <class X, class Row>
MK_DEVICE void start_rows(int tid, int rows, const Views& views, const Rows& from, int64_t at, int64_t columns,
                          char* tile, int pitch, Row&& row_of) {
  const DType type = views.of[from.of].dtype;
  auto part_of = [&](int i) -> const char* {
    const char* row = row_of(i);
    return row == nullptr ? nullptr : row + at * size_of(type);
  };
  columns = least(columns, from.width - at);
  if (type == kTypeOf<X>) {
    copy_rows<X, kThreads>(tid, rows, columns, from.packs, views.of[from.of].data, tile, pitch, part_of);
  } else if constexpr (sizeof(X) == 4) {
    widen_rows<kThreads>(tid, type, rows, columns, tile, pitch, part_of);
  }
}

// Tokens of a tile, in shared memory.
template <int S>
struct Tokens {
  const char *query[S], *write[S];  // of `query` or of the given gates; null: the token does not write
  SoftmaxRow<float> softmax[S];
  bool writes[S];
};

// Threads below S: look up the tokens from t0 on.
template <int S>
MK_DEVICE void look_up(Tokens<S>& tile, const Writing& w, const Views& views, const Bases& bases, int64_t batch,
                       int64_t t0) {
  const int r = int(threadIdx.x);
  if (r >= S) return;
  const Pairs& p = w.pairs;
  const int64_t t = t0 + r, all = p.lead.folded() * p.T;
  bool writes = t < all;
  auto row_of = [&](Tensor which) -> char* {
    char* base = bases.of[which];
    return base != nullptr && writes ? token_row(views.of[which], p.lead, base, p.T, t) : nullptr;
  };
  if (const char* mask = row_of(kTokenMask); mask != nullptr) writes = *mask != 0;
  tile.query[r] = row_of(kQuery), tile.write[r] = row_of(kWrite);
  if (w.softmax != nullptr && writes) tile.softmax[r] = w.softmax[batch * all + t];
  tile.writes[r] = writes;
}

// The mask's term in the scores of slot i; -inf if the slot is empty or does not exist.
MK_DEVICE float added_to(const Pairs& p, const char* mask, int64_t i) {
  return i < p.N ? mask_at(p.mask, mask, i) : -kInfinity;
}

// A gate in one register: a, or if a computed gate is above 1/2, a - 1 with the sign bit set, since there 1 - a needs
// all its digits. Given gates are always a.
struct Gates {
  bool given;
  MK_DEVICE float open(float x) const { return above(x) ? 1 + x : x; }
  MK_DEVICE float keep(float x) const { return above(x) ? -x : 1 - x; }
  MK_DEVICE bool above(float x) const { return !given && __float_as_uint(x) >> 31 != 0; }
};

// Turns products x of queries and keys into gates: 0 for tokens that do not write and for slots that are not open.
// Given gates are unchanged. token(j, i) and slot(j, i): the positions of x[j][i]; added(j, i): the mask's term there;
// first: the slot at position 0.
template <int S, int R, class Token, class Slot, class Added>
MK_DEVICE void to_gates(float (&x)[S / 8][4], const Writing& w, const Tokens<R>& tokens, int64_t first, Token&& token,
                        Slot&& slot, Added&& added) {
  const float scale = float(w.pairs.scale);
  auto each = [&](auto&& gate) {
#pragma unroll
    for (int j = 0; j < S / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool closed = added(j, i) == -kInfinity || !tokens.writes[token(j, i)];
        x[j][i] = closed ? 0.f : gate(j, i);
      }
    }
  };
  if (w.pairs.weights) {
    each([&](int j, int i) { return x[j][i]; });
  } else if (w.softmax != nullptr) {
    each([&](int j, int i) {
      const SoftmaxRow<float>& row = tokens.softmax[token(j, i)];
      const bool largest = first + slot(j, i) == row.slot && row.left < 0.5f;
      const float above = at_most_zero(score(scale, x[j][i], added(j, i)) - row.top);
      return largest ? -row.left : power_of_two(above * kLog2e) * row.inverse;
    });
  } else {
    each([&](int j, int i) {
      const float s = score(scale, x[j][i], added(j, i));
      const float z = power_of_two(-fabsf(s) * kLog2e), small = z * reciprocal(1 + z);
      return s > 0 ? -small : small;
    });
  }
}

// R after two neighbouring tokens of a row: r0 and r1, from their factors f0 and f1. Four neighbouring lanes share the
// columns of a row in pairs. `left` is R after the eight tokens, and becomes R before them.
MK_DEVICE void leave(int lane, float f0, float f1, float& left, float& r0, float& r1) {
  const float pair = f0 * f1, next = __shfl_xor_sync(kAllLanes, pair, 1);
  const float half = pair * next, other = __shfl_xor_sync(kAllLanes, half, 2);
  r1 = left;
  if (lane % 4 < 2) r1 *= other;
  if (lane % 2 == 0) r1 *= next;
  r0 = r1 * f1, left *= half * other;
}

// Calls body<M>() for the arithmetic that these operands need.
template <class Body>
void with_arithmetic(const Device& device, const Writing& w, std::initializer_list<const View*> operands, Body&& body) {
  DType type = DType::boolean;
  for (const View* v : operands) {
    if (*v) type = type == DType::boolean || type == v->dtype ? v->dtype : DType::f32;
  }
  // The softmax pass computes scores in float32. Scores of another precision would not add up to a softmax.
  if (type == DType::bf16) body.template operator()<bf16>();
  else if (type == DType::f16) body.template operator()<f16>();
  else if (w.softmax == nullptr && device.allows_tf32(device.owner)) body.template operator()<tf32>();
  else body.template operator()<float>();
}

}  // namespace
}  // namespace mk::cuda
