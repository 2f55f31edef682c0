#include "params/topk_search.h"

#include "binding/chosen_slots.h"

namespace mk {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// Checks the inputs and fills in `p`, except for the results.
struct Inputs {
  Arguments args;
  const Tensor *query, *keys, *mask, *range, *key_scale;

  Inputs(const char* op, const Tensor& q, const Tensor& k, const std::optional<Tensor>& m,
         const std::optional<Tensor>& r, const std::optional<Tensor>& scale)
      : args(op) {
    const int64_t K = size_at(op, "query", q, -1), N = size_at(op, "keys", k, -2);
    query = &args.add("query", q, Side::tokens, {size_at(op, "query", q, -2), K});
    keys = &args.add("keys", k, Side::memory, {N, K});
    mask = args.add("slot_mask", m, Side::memory, {N});
    range = args.ranges(r, size_at(op, "query", q, -2));
    key_scale = args.add("key_scale", scale, Side::memory, {N});
    args.floats({query});
    args.slots(*keys, key_scale, *query);
    args.mask(mask, *query);
  }
};

Two run(const Tensor& query, const Tensor& keys, const std::optional<Tensor>& slot_mask,
        const std::optional<Tensor>& slot_range, const std::optional<Tensor>& key_scale, int64_t k, double scale) {
  Inputs in("topk_search", query, keys, slot_mask, slot_range, key_scale);
  in.args.require(k >= 1, "k must be at least 1");
  TopkSearch p;
  p.lead = in.args.lead();
  p.T = query.size(query.dim() - 2), p.K = query.size(query.dim() - 1), p.N = keys.size(keys.dim() - 2);
  p.k = k, p.scale = scale;
  p.query = in.args.view(in.query, 2), p.keys = in.args.slot_view(in.keys, in.key_scale);
  p.mask = in.args.view(in.mask, 1), p.range = in.args.view(in.range, 2);
  Tensor scores = empty(in.args.sizes(Side::tokens, {p.T, k}), query.scalar_type());
  Tensor indices = empty(in.args.sizes(Side::tokens, {p.T, k}), ScalarType::Long);
  p.scores = in.args.view(scores, 2), p.indices = in.args.view(indices, 2);
  MK_CALL(topk_search, p);
  return {scores, indices};
}

Three run_backward(const Tensor& query, const Tensor& keys, const std::optional<Tensor>& slot_mask,
                   const std::optional<Tensor>& slot_range, const std::optional<Tensor>& key_scale,
                   const Tensor& indices, const std::optional<Tensor>& d_scores, int64_t k, double scale,
                   const std::vector<bool>& wants) {
  Inputs in("topk_search_backward", query, keys, slot_mask, slot_range, key_scale);
  in.args.require(wants.size() == 3, "wants must have 3 entries");
  in.args.require(d_scores.has_value(), "d_scores must be given");
  TopkSearchBackward p;
  Choice& c = p.choice;
  c.T = query.size(query.dim() - 2), c.k = k, c.N = keys.size(keys.dim() - 2);
  p.K = query.size(query.dim() - 1), p.scale = scale;
  const Tensor* chosen = &in.args.add("indices", indices, Side::tokens, {c.T, k});
  const Tensor* ds = in.args.add("d_scores", d_scores, Side::tokens, {c.T, k});
  in.args.require(chosen->scalar_type() == ScalarType::Long, "indices must be int64");
  in.args.floats({in.query, ds});
  c.lead = in.args.lead();
  c.indices = in.args.view(chosen, 2);
  check_indices(in.args.op(), c);
  p.query = in.args.view(in.query, 2), p.keys = in.args.slot_view(in.keys, in.key_scale);
  p.d_scores = in.args.view(ds, 2);
  const bool masked = in.mask != nullptr && in.mask->scalar_type() != ScalarType::Bool;
  const Gradient d_query(in.args, in.query, wants[0], Side::tokens, 2);
  const ChosenGradient d_keys(in.args, in.keys, wants[1], 2, *chosen),
      d_mask(in.args, in.mask, wants[2] && masked, 1, *chosen);
  p.d_query = d_query.view(), p.d_keys = d_keys.out(), p.d_mask = d_mask.out();
  MK_CALL(topk_search_backward, p);
  return {d_query.result(), d_keys.result(), d_mask.result()};
}

Two forward(const Tensor& query, const Tensor& keys, const std::optional<Tensor>& slot_mask,
            const std::optional<Tensor>& slot_range, int64_t k, double scale) {
  return run(query, keys, slot_mask, slot_range, std::nullopt, k, scale);
}

Three backward(const Tensor& query, const Tensor& keys, const std::optional<Tensor>& slot_mask,
               const std::optional<Tensor>& slot_range, const Tensor& indices, const std::optional<Tensor>& d_scores,
               int64_t k, double scale, const std::vector<bool>& wants) {
  return run_backward(query, keys, slot_mask, slot_range, std::nullopt, indices, d_scores, k, scale, wants);
}

Two backward_compressed(const Tensor& query, const Tensor& keys, const std::optional<Tensor>& slot_mask,
                        const std::optional<Tensor>& slot_range, const std::optional<Tensor>& key_scale,
                        const Tensor& indices, const std::optional<Tensor>& d_scores, int64_t k, double scale,
                        const std::vector<bool>& wants) {
  check(wants.size() == 2, "topk_search_compressed_backward: wants must have 2 entries");
  const Three d = run_backward(query, keys, slot_mask, slot_range, key_scale, indices, d_scores, k, scale,
                               {wants[0], false, wants[1]});
  return {std::get<0>(d), std::get<2>(d)};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "topk_search", &mk::forward);
  MK_OPERATOR(m, "topk_search_backward", &mk::backward);
  if (mk::kCompressedSlots) {
    MK_OPERATOR(m, "topk_search_compressed", &mk::run);
    MK_OPERATOR(m, "topk_search_compressed_backward", &mk::backward_compressed);
  }
}
