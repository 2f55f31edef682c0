#include "params/topk_read.h"

#include "binding/chosen_slots.h"

namespace mk {
namespace {

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Checks the inputs.
struct Inputs {
  Arguments args;
  const Tensor *query, *keys, *values, *mask, *range, *key_scale, *value_scale;
  int64_t T, N, K, V;

  Inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& m,
         const std::optional<Tensor>& r, const Scales& scales)
      : args(op) {
    T = size_at(op, "query", q, -2), K = size_at(op, "query", q, -1);
    N = size_at(op, "keys", k, -2), V = size_at(op, "values", v, -1);
    query = &args.add("query", q, Side::tokens, {T, K});
    keys = &args.add("keys", k, Side::memory, {N, K});
    values = &args.add("values", v, Side::memory, {N, V});
    mask = args.add("slot_mask", m, Side::memory, {N});
    range = args.ranges(r, T);
    key_scale = args.add("key_scale", scales.keys, Side::memory, {N});
    value_scale = args.add("value_scale", scales.values, Side::memory, {N});
    args.floats({query});
    args.slots(*keys, key_scale, *query);
    args.slots(*values, value_scale, *query);
    args.mask(mask, *query);
  }
};

Four run(const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& slot_mask,
         const std::optional<Tensor>& slot_range, const std::optional<Tensor>& key_scale,
         const std::optional<Tensor>& value_scale, int64_t k, double scale) {
  Inputs in("topk_read", query, keys, values, slot_mask, slot_range, {key_scale, value_scale});
  in.args.require(k >= 1, "k must be at least 1");
  TopkRead p;
  TopkSearch& s = p.search;
  s.lead = in.args.lead();
  s.T = in.T, s.K = in.K, s.N = in.N, s.k = k, s.scale = scale, p.V = in.V;
  s.query = in.args.view(in.query, 2), s.keys = in.args.slot_view(in.keys, in.key_scale);
  s.mask = in.args.view(in.mask, 1), s.range = in.args.view(in.range, 2),
  p.values = in.args.slot_view(in.values, in.value_scale);
  Tensor read = empty(in.args.sizes(Side::tokens, {in.T, in.V}), query.scalar_type());
  Tensor indices = empty(in.args.sizes(Side::tokens, {in.T, k}), ScalarType::Long);
  Tensor weights = empty(in.args.sizes(Side::tokens, {in.T, k}), stats_type(query.scalar_type()));
  Tensor lse = empty(in.args.sizes(Side::tokens, {in.T}), stats_type(query.scalar_type()));
  p.read = in.args.view(read, 2), s.indices = in.args.view(indices, 2), p.weights = in.args.view(weights, 2);
  p.lse = in.args.view(lse, 1);
  MK_CALL(topk_read, p);
  return {read, indices, weights, lse};
}

Four run_backward(const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& slot_mask,
                  const std::optional<Tensor>& slot_range, const Scales& scales, const Tensor& indices,
                  const Tensor& weights, const std::optional<Tensor>& d_read, const std::optional<Tensor>& d_weights,
                  const std::optional<Tensor>& d_lse, int64_t k, double scale, const std::vector<bool>& wants) {
  Inputs in("topk_read_backward", query, keys, values, slot_mask, slot_range, scales);
  in.args.require(wants.size() == 4, "wants must have 4 entries");
  TopkReadBackward p;
  TopkSearchBackward& s = p.search;
  Choice& c = s.choice;
  c.T = in.T, c.k = k, c.N = in.N, s.K = in.K, s.scale = scale, p.V = in.V;
  const Tensor* chosen = &in.args.add("indices", indices, Side::tokens, {in.T, k});
  const Tensor* w = &in.args.add("weights", weights, Side::tokens, {in.T, k});
  const Tensor* dr = in.args.add("d_read", d_read, Side::tokens, {in.T, in.V});
  const Tensor* dw = in.args.add("d_weights", d_weights, Side::tokens, {in.T, k});
  const Tensor* dl = in.args.add("d_lse", d_lse, Side::tokens, {in.T});
  in.args.require(chosen->scalar_type() == ScalarType::Long, "indices must be int64");
  in.args.floats({in.query, dr});
  in.args.stats({w, dw, dl}, query);
  c.lead = in.args.lead();
  c.indices = in.args.view(chosen, 2);
  check_indices(in.args.op(), c);
  s.query = in.args.view(in.query, 2), s.keys = in.args.slot_view(in.keys, in.key_scale);
  p.values = in.args.slot_view(in.values, in.value_scale);
  p.weights = in.args.view(w, 2), p.d_read = in.args.view(dr, 2), p.d_weights = in.args.view(dw, 2);
  p.d_lse = in.args.view(dl, 1);
  const bool masked = in.mask != nullptr && in.mask->scalar_type() != ScalarType::Bool;
  const Gradient d_query(in.args, in.query, wants[0], Side::tokens, 2);
  const ChosenGradient d_keys(in.args, in.keys, wants[1], 2, *chosen),
      d_values(in.args, in.values, wants[2], 2, *chosen);
  const ChosenGradient d_mask(in.args, in.mask, wants[3] && masked, 1, *chosen);
  s.d_query = d_query.view(), s.d_keys = d_keys.out(), s.d_mask = d_mask.out(), p.d_values = d_values.out();
  MK_CALL(topk_read_backward, p);
  return {d_query.result(), d_keys.result(), d_values.result(), d_mask.result()};
}

Four forward(const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& slot_mask,
             const std::optional<Tensor>& slot_range, int64_t k, double scale) {
  return run(query, keys, values, slot_mask, slot_range, std::nullopt, std::nullopt, k, scale);
}

Four backward(const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& slot_mask,
              const std::optional<Tensor>& slot_range, const Tensor& indices, const Tensor& weights,
              const std::optional<Tensor>& d_read, const std::optional<Tensor>& d_weights,
              const std::optional<Tensor>& d_lse, int64_t k, double scale, const std::vector<bool>& wants) {
  return run_backward(query, keys, values, slot_mask, slot_range, {}, indices, weights, d_read, d_weights, d_lse, k,
                      scale, wants);
}

std::tuple<Tensor, Tensor> backward_compressed(
    const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& slot_mask,
    const std::optional<Tensor>& slot_range, const std::optional<Tensor>& key_scale,
    const std::optional<Tensor>& value_scale, const Tensor& indices, const Tensor& weights,
    const std::optional<Tensor>& d_read, const std::optional<Tensor>& d_weights, const std::optional<Tensor>& d_lse,
    int64_t k, double scale, const std::vector<bool>& wants) {
  check(wants.size() == 2, "topk_read_compressed_backward: wants must have 2 entries");
  const Four d = run_backward(query, keys, values, slot_mask, slot_range, {key_scale, value_scale}, indices, weights,
                              d_read, d_weights, d_lse, k, scale, {wants[0], false, false, wants[1]});
  return {std::get<0>(d), std::get<3>(d)};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "topk_read", &mk::forward);
  MK_OPERATOR(m, "topk_read_backward", &mk::backward);
  if (mk::kCompressedSlots) {
    MK_OPERATOR(m, "topk_read_compressed", &mk::run);
    MK_OPERATOR(m, "topk_read_compressed_backward", &mk::backward_compressed);
  }
}
