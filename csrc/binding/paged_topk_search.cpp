#include "params/paged_topk_search.h"

#include "binding/chosen_slots.h"

namespace mk {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Maybe = std::optional<Tensor>;

constexpr int64_t kMostSlots = int64_t(1) << 62;  // slot numbers are below

// [..., F, S, tail] -> [..., F * S, tail]; `tail`: the number of dimensions after S.
Tensor joined(const char* op, const char* name, const Tensor& t, int64_t tail) {
  size_at(op, name, t, -2 - tail);
  check_storage(op, name, t);
  Sizes sizes(t.sizes().begin(), t.sizes().end());
  const auto at = sizes.end() - 2 - tail;
  at[1] *= at[0];
  sizes.erase(at);
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes.data(), sizes.size());
  return made(bytes_of(t), [&] { return torch::stable::reshape(t, shape); });
}
Maybe joined(const char* op, const char* name, const Maybe& t, int64_t tail) {
  return t.has_value() ? Maybe(joined(op, name, *t, tail)) : std::nullopt;
}

// The inverse, for the gradient of such an argument.
Tensor parted(const Tensor& t, bool wanted, int64_t tail, const Frames& frames) {
  if (!wanted) return t;
  Sizes sizes(t.sizes().begin(), t.sizes().end());
  const auto at = sizes.end() - 1 - tail;
  *at = frames.F;
  sizes.insert(at + 1, frames.S);
  return torch::stable::reshape(t, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()));
}

// Checks the inputs. The arguments of frames have one dimension of F * S slots.
struct Inputs {
  Arguments args;
  Frames frames;
  int64_t T, K;
  const Tensor *query, *keys, *pages, *mask, *best_scores, *best_slots, *key_scale;

  Inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& p, const Maybe& m, const Maybe& scores,
         const Maybe& slots, const Maybe& scale, int64_t neighbours)
      : args(op), T(size_at(op, "query", q, -2)), K(size_at(op, "query", q, -1)) {
    frames.F = size_at(op, "keys", k, -3), frames.S = size_at(op, "keys", k, -2);
    for (const Maybe* t : {&m, &scale}) {
      args.require(!t->has_value() || ((*t)->dim() >= 2 && (*t)->size((*t)->dim() - 2) == frames.F &&
                                       (*t)->size((*t)->dim() - 1) == frames.S),
                   "slot_mask and key_scale must be [..., F, S] as keys are");
    }
    args.require(frames.F <= kMaxSize / most(frames.S, 1), "keys must hold at most 2^40 slots");
    const int64_t N = frames.F * frames.S;
    query = &args.add("query", q, Side::tokens, {T, K});
    keys = &args.add("keys", joined(op, "keys", k, 1), Side::memory, {N, K});
    pages = &args.add("pages", p, Side::memory, {frames.F});
    mask = args.add("slot_mask", joined(op, "slot_mask", m, 0), Side::memory, {N});
    best_scores = args.add("best_scores", scores, Side::tokens, {T, neighbours});
    best_slots = args.add("best_slots", slots, Side::tokens, {T, neighbours});
    key_scale = args.add("key_scale", joined(op, "key_scale", scale, 0), Side::memory, {N});
    args.floats({query});
    args.slots(*keys, key_scale, *query);
    args.mask(mask, *query);
    args.require((best_scores == nullptr) == (best_slots == nullptr), "best must have both scores and slots");
    args.stats({best_scores}, *query);
    args.require(pages->scalar_type() == ScalarType::Long, "pages must be int64");
    args.require(best_slots == nullptr || best_slots->scalar_type() == ScalarType::Long,
                 "the slots of best must be int64");
    args.require(neighbours >= 1, "k must be at least 1");
  }

  // Call it after the last argument is added.
  void fill() {
    const Lead& lead = args.lead();
    frames.pages = args.view(pages, 1);
    frames.best_scores = args.view(best_scores, 2), frames.best_slots = args.view(best_slots, 2);
    if (frames.F > 0) {
      check_indices(args.op(), Choice{lead, 1, frames.F, kMostSlots / most(frames.S, 1), frames.pages}, "pages");
    }
    if (best_slots == nullptr) return;
    check_indices(args.op(), Choice{lead, T, best_slots->size(best_slots->dim() - 1), kMostSlots, frames.best_slots},
                  "the slots of best");
  }
};

Two run(const Tensor& query, const Tensor& keys, const Tensor& pages, const Maybe& slot_mask, const Maybe& best_scores,
        const Maybe& best_slots, const Maybe& key_scale, int64_t k, double scale) {
  Inputs in("paged_topk_search", query, keys, pages, slot_mask, best_scores, best_slots, key_scale, k);
  in.fill();
  PagedTopkSearch p;
  TopkSearch& s = p.search;
  s.lead = in.args.lead();
  s.T = in.T, s.K = in.K, s.N = in.frames.F * in.frames.S, s.k = k, s.scale = scale;
  s.query = in.args.view(in.query, 2), s.keys = in.args.slot_view(in.keys, in.key_scale);
  s.mask = in.args.view(in.mask, 1);
  Tensor scores = empty(in.args.sizes(Side::tokens, {s.T, k}), stats_type(query.scalar_type()));
  Tensor slots = empty(in.args.sizes(Side::tokens, {s.T, k}), ScalarType::Long);
  s.scores = in.args.view(scores, 2), s.indices = in.args.view(slots, 2);
  p.frames = in.frames;
  MK_CALL(paged_topk_search, p);
  return {scores, slots};
}

Four run_backward(const Tensor& query, const Tensor& keys, const Tensor& pages, const Maybe& slot_mask,
                  const Maybe& best_scores, const Maybe& best_slots, const Maybe& key_scale, const Tensor& slots,
                  const Maybe& d_scores, int64_t k, double scale, const std::vector<bool>& wants) {
  Inputs in("paged_topk_search_backward", query, keys, pages, slot_mask, best_scores, best_slots, key_scale, k);
  in.args.require(wants.size() == 4, "wants must have 4 entries");
  in.args.require(d_scores.has_value(), "d_scores must be given");
  const Tensor* chosen = &in.args.add("slots", slots, Side::tokens, {in.T, k});
  const Tensor* ds = in.args.add("d_scores", d_scores, Side::tokens, {in.T, k});
  in.args.require(chosen->scalar_type() == ScalarType::Long, "slots must be int64");
  in.args.stats({ds}, *in.query);
  in.fill();
  PagedTopkSearchBackward p;
  TopkSearchBackward& s = p.search;
  s.choice.lead = in.args.lead(), s.choice.T = in.T, s.choice.k = k, s.choice.N = in.frames.F * in.frames.S;
  s.K = in.K, s.scale = scale;
  s.query = in.args.view(in.query, 2), s.keys = in.args.slot_view(in.keys, in.key_scale);
  s.d_scores = in.args.view(ds, 2);
  p.frames = in.frames, p.slots = in.args.view(chosen, 2);
  const bool masked = in.mask != nullptr && in.mask->scalar_type() != ScalarType::Bool;
  const Gradient d_query(in.args, in.query, wants[0], Side::tokens, 2);
  const ChosenGradient d_keys(in.args, in.keys, wants[1], 2, *chosen),
      d_mask(in.args, in.mask, wants[2] && masked, 1, *chosen);
  const Gradient d_best(in.args, in.best_scores, wants[3] && in.best_scores != nullptr, Side::tokens, 2);
  s.d_query = d_query.view(), s.d_keys = d_keys.out(), s.d_mask = d_mask.out(), p.d_best = d_best.view();
  MK_CALL(paged_topk_search_backward, p);
  return {d_query.result(), parted(d_keys.result(), wants[1], 1, in.frames),
          parted(d_mask.result(), wants[2] && masked, 0, in.frames), d_best.result()};
}

Two forward(const Tensor& query, const Tensor& keys, const Tensor& pages, const Maybe& slot_mask,
            const Maybe& best_scores, const Maybe& best_slots, int64_t k, double scale) {
  return run(query, keys, pages, slot_mask, best_scores, best_slots, std::nullopt, k, scale);
}

Four backward(const Tensor& query, const Tensor& keys, const Tensor& pages, const Maybe& slot_mask,
              const Maybe& best_scores, const Maybe& best_slots, const Tensor& slots, const Maybe& d_scores, int64_t k,
              double scale, const std::vector<bool>& wants) {
  return run_backward(query, keys, pages, slot_mask, best_scores, best_slots, std::nullopt, slots, d_scores, k, scale,
                      wants);
}

Three backward_compressed(const Tensor& query, const Tensor& keys, const Tensor& pages, const Maybe& slot_mask,
                          const Maybe& best_scores, const Maybe& best_slots, const Maybe& key_scale,
                          const Tensor& slots, const Maybe& d_scores, int64_t k, double scale,
                          const std::vector<bool>& wants) {
  check(wants.size() == 3, "paged_topk_search_compressed_backward: wants must have 3 entries");
  const Four d = run_backward(query, keys, pages, slot_mask, best_scores, best_slots, key_scale, slots, d_scores, k,
                              scale, {wants[0], false, wants[1], wants[2]});
  return {std::get<0>(d), std::get<2>(d), std::get<3>(d)};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "paged_topk_search", &mk::forward);
  MK_OPERATOR(m, "paged_topk_search_backward", &mk::backward);
  if (mk::kCompressedSlots) {
    MK_OPERATOR(m, "paged_topk_search_compressed", &mk::run);
    MK_OPERATOR(m, "paged_topk_search_compressed_backward", &mk::backward_compressed);
  }
}
