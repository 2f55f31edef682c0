// Kernels on chosen slots with a warp per token.
#pragma once

#include "cuda/tiles/chosen_rows.h"
#include "cuda/tiles/row_packs.h"
#include "cuda/tiles/stream.h"

namespace mk::cuda {

constexpr int kWarps = kThreads / 32;

// The token of a warp; of `parts` warps that share it, `part` is this one.
struct Token {
  int64_t at, batch, t, part;
  MK_DEVICE explicit Token(const Choice& c, int64_t parts = 1) {
    at = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    part = at % parts, at /= parts;
    batch = at / most(c.tokens(), 1), t = at % most(c.tokens(), 1);
  }
  MK_DEVICE char* row(const View& v, const Choice& c) const {
    return token_row(v, c.lead, v.batch(c.lead, batch), c.T, t);
  }
};

// Calls body<X, aligned>() with the type of the rows, and whether they consist of whole packs.
template <class Body>
void with_rows(const View& rows, const Lead& lead, int64_t width, Body&& body) {
  const bool packs = in_packs(rows, lead, width);
  with_type(rows.dtype, [&]<class X>() {
    if (packs) body.template operator()<X, true>();
    else body.template operator()<X, false>();
  });
}

// The score x of the slot that an index names: -inf for -1, NaN for one outside the memory.
MK_DEVICE float scored(int64_t slot, int64_t slots, float x) {
  if (slot == -1) return -kInfinity;
  return slot >= 0 && slot < slots ? x : __uint_as_float(0x7fc00000u);
}

// The slots of a token in parts of `span`, so that few tokens fill the GPU too. Follows from shapes.
struct NamedParts {
  int64_t count, span;
};
inline NamedParts cut_named(const Device& device, const Choice& c) {
  constexpr int64_t kWarpsPerSm = 16, kLeast = 32;  // warps that hide the latency of a gather; slots of a part
  const int64_t wanted = div_up(device.sms * kWarpsPerSm, most(c.all_tokens(), 1));
  const int64_t span = round_up(div_up(most(c.k, 1), wanted), kLeast);
  return {div_up(most(c.k, 1), span), span};
}

}  // namespace mk::cuda
