#include "params/selected_read.h"

#include "binding/chosen_slots.h"

namespace mk {
namespace {

using Optional = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Checks the inputs.
struct Inputs {
  Arguments args;
  Choice choice;
  int64_t K, V;
  const Tensor *query, *keys, *values, *indices, *mask, *key_scale, *value_scale;

  Inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Optional& m,
         const Scales& scales)
      : args(op) {
    K = size_at(op, "query", q, -1), V = size_at(op, "values", v, -1);
    choice.T = size_at(op, "query", q, -2), choice.N = size_at(op, "keys", k, -2);
    choice.k = size_at(op, "indices", i, -1);
    query = &args.add("query", q, Side::tokens, {choice.T, K});
    keys = &args.add("keys", k, Side::memory, {choice.N, K});
    values = &args.add("values", v, Side::memory, {choice.N, V});
    indices = &args.add("indices", i, Side::tokens, {choice.T, choice.k});
    mask = args.add("slot_mask", m, Side::memory, {choice.N});
    key_scale = args.add("key_scale", scales.keys, Side::memory, {choice.N});
    value_scale = args.add("value_scale", scales.values, Side::memory, {choice.N});
    args.floats({query});
    args.slots(*keys, key_scale, *query);
    args.slots(*values, value_scale, *query);
    args.mask(mask, *query);
    args.require(indices->scalar_type() == ScalarType::Long, "indices must be int64");
  }
  // To be called once all arguments have been added.
  const Choice& checked() {
    choice.lead = args.lead();
    choice.indices = args.view(indices, 2);
    check_indices(args.op(), choice);
    return choice;
  }
};

Three run(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& indices,
          const Optional& slot_mask, const Optional& key_scale, const Optional& value_scale, double scale) {
  Inputs in("selected_read", query, keys, values, indices, slot_mask, {key_scale, value_scale});
  SelectedRead p;
  p.choice = in.checked(), p.K = in.K, p.V = in.V, p.scale = scale;
  p.query = in.args.view(in.query, 2), p.keys = in.args.slot_view(in.keys, in.key_scale);
  p.values = in.args.slot_view(in.values, in.value_scale), p.mask = in.args.view(in.mask, 1);
  const ScalarType stats = stats_type(query.scalar_type());
  Tensor read = empty(in.args.sizes(Side::tokens, {in.choice.T, in.V}), query.scalar_type());
  Tensor weights = empty(in.args.sizes(Side::tokens, {in.choice.T, in.choice.k}), stats);
  Tensor lse = empty(in.args.sizes(Side::tokens, {in.choice.T}), stats);
  p.read = in.args.view(read, 2), p.weights = in.args.view(weights, 2), p.lse = in.args.view(lse, 1);
  MK_CALL(selected_read, p);
  return {read, weights, lse};
}

Four run_backward(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& indices,
                  const Optional& slot_mask, const Scales& scales, const Tensor& weights, const Optional& d_read,
                  const Optional& d_weights, const Optional& d_lse, double scale, const std::vector<bool>& wants) {
  Inputs in("selected_read_backward", query, keys, values, indices, slot_mask, scales);
  in.args.require(wants.size() == 4, "wants must have 4 entries");
  const int64_t T = in.choice.T, k = in.choice.k;
  const Tensor* w = &in.args.add("weights", weights, Side::tokens, {T, k});
  const Tensor* dr = in.args.add("d_read", d_read, Side::tokens, {T, in.V});
  const Tensor* dw = in.args.add("d_weights", d_weights, Side::tokens, {T, k});
  const Tensor* dl = in.args.add("d_lse", d_lse, Side::tokens, {T});
  in.args.floats({in.query, dr});
  in.args.stats({w, dw, dl}, query);
  SelectedReadBackward b;
  TopkReadBackward& p = b.read;
  TopkSearchBackward& s = p.search;
  s.choice = in.checked(), s.K = in.K, s.scale = scale, p.V = in.V;
  s.query = in.args.view(in.query, 2), s.keys = in.args.slot_view(in.keys, in.key_scale);
  p.values = in.args.slot_view(in.values, in.value_scale), b.mask = in.args.view(in.mask, 1);
  p.weights = in.args.view(w, 2), p.d_read = in.args.view(dr, 2), p.d_weights = in.args.view(dw, 2);
  b.read.d_lse = in.args.view(dl, 1);
  const bool masked = in.mask != nullptr && in.mask->scalar_type() != ScalarType::Bool;
  const Gradient d_query(in.args, in.query, wants[0], Side::tokens, 2);
  const ChosenGradient d_keys(in.args, in.keys, wants[1], 2, *in.indices),
      d_values(in.args, in.values, wants[2], 2, *in.indices),
      d_mask(in.args, in.mask, wants[3] && masked, 1, *in.indices);
  s.d_query = d_query.view(), s.d_keys = d_keys.out(), s.d_mask = d_mask.out(), p.d_values = d_values.out();
  MK_CALL(selected_read_backward, b);
  return {d_query.result(), d_keys.result(), d_values.result(), d_mask.result()};
}

Three forward(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& indices,
              const Optional& slot_mask, double scale) {
  return run(query, keys, values, indices, slot_mask, std::nullopt, std::nullopt, scale);
}

Four backward(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& indices,
              const Optional& slot_mask, const Tensor& weights, const Optional& d_read, const Optional& d_weights,
              const Optional& d_lse, double scale, const std::vector<bool>& wants) {
  return run_backward(query, keys, values, indices, slot_mask, {}, weights, d_read, d_weights, d_lse, scale, wants);
}

// Compressed slots, and float ones beside them, have no gradient.
Two backward_compressed(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& indices,
                        const Optional& slot_mask, const Optional& key_scale, const Optional& value_scale,
                        const Tensor& weights, const Optional& d_read, const Optional& d_weights, const Optional& d_lse,
                        double scale, const std::vector<bool>& wants) {
  check(wants.size() == 2, "selected_read_compressed_backward: wants must have 2 entries");
  const Four d = run_backward(query, keys, values, indices, slot_mask, {key_scale, value_scale}, weights, d_read,
                              d_weights, d_lse, scale, {wants[0], false, false, wants[1]});
  return {std::get<0>(d), std::get<3>(d)};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "selected_read", &mk::forward);
  MK_OPERATOR(m, "selected_read_backward", &mk::backward);
  if (mk::kCompressedSlots) {
    MK_OPERATOR(m, "selected_read_compressed", &mk::run);
    MK_OPERATOR(m, "selected_read_compressed_backward", &mk::backward_compressed);
  }
}
