// selected_scores:  s[t, j] = scale <q_t, k_i> with i = indices[t, j], -inf where that is -1
//
// Bound by the bandwidth of scattered rows: a warp per token, or where tokens are few per token and part of its slots,
// several rows in flight (cuda/tiles/row_packs.h). The gradient is that of a search that chose these slots.
#include "cuda/tiles/chosen_warps.h"
#include "params/selected_scores.h"

namespace mk::cuda {
namespace {

template <class X, bool aligned>
MK_KERNEL(kThreads)
score_rows(MK_PARAM(SelectedScores) p, int64_t parts, int64_t span) {
  const Choice& c = p.choice;
  const Token token(c, parts);
  if (token.at >= c.all_tokens()) return;
  const auto* index = reinterpret_cast<const int64_t*>(token.row(c.indices, c));
  const char* query = token.row(p.query, c);
  char* out = token.row(p.scores, c);
  const RowSource rows{p.keys.batch(c.lead, token.batch), p.keys.row, c.N, p.K};
  const int G = lanes_per_row<X>(p.K), lane = int(threadIdx.x) & 31, groups = 32 / G;
  const int64_t end = least(c.k, (token.part + 1) * span);
  for (int64_t j0 = token.part * span; j0 < end; j0 += groups) {
    const int64_t j = j0 + lane / G, slot = j < end ? index[j] : -1;
    const float x =
        multiply_row<X, aligned>(rows, slot, G, [&](int64_t column) { return load(query, p.query.dtype, column); });
    if (j < end && lane % G == 0) store(out, p.scores.dtype, j, scored(slot, c.N, float(p.scale) * x));
  }
}

}  // namespace

void selected_scores(const Device& device, const SelectedScores& p) {
  const NamedParts parts = cut_named(device, p.choice);
  with_rows(p.keys, p.choice.lead, p.K, [&]<class X, bool aligned>() {
    launch(device, "selected_scores", score_rows<X, aligned>, div_up(p.choice.all_tokens() * parts.count, kWarps),
           kThreads, 0, p, parts.count, parts.span);
  });
}

}  // namespace mk::cuda
