#include "params/softmax_read.h"

#include "binding/saved_read.h"

namespace mk {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Checks the inputs and fills in `p`, except for the results.
struct Inputs {
  Arguments args;
  const Tensor *query, *keys, *values, *mask, *range, *key_scale, *value_scale;

  Inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& m,
         const std::optional<Tensor>& r, const Scales& scales, double scale, SoftmaxRead& p)
      : args(op) {
    p.T = size_at(op, "query", q, -2), p.K = size_at(op, "query", q, -1);
    p.N = size_at(op, "keys", k, -2), p.V = size_at(op, "values", v, -1);
    p.scale = scale;
    query = &args.add("query", q, Side::tokens, {p.T, p.K});
    keys = &args.add("keys", k, Side::memory, {p.N, p.K});
    values = &args.add("values", v, Side::memory, {p.N, p.V});
    mask = args.add("slot_mask", m, Side::memory, {p.N});
    range = args.ranges(r, p.T);
    key_scale = args.add("key_scale", scales.keys, Side::memory, {p.N});
    value_scale = args.add("value_scale", scales.values, Side::memory, {p.N});
    args.floats({query});
    args.slots(*keys, key_scale, *query);
    args.slots(*values, value_scale, *query);
    args.mask(mask, *query);
  }
  void fill(SoftmaxRead& p) {
    p.lead = args.lead();
    p.query = args.view(query, 2);
    p.keys = args.slot_view(keys, key_scale), p.values = args.slot_view(values, value_scale);
    p.mask = args.view(mask, 1), p.range = args.view(range, 2);
  }
};

Three run(const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& slot_mask,
          const std::optional<Tensor>& slot_range, const std::optional<Tensor>& key_scale,
          const std::optional<Tensor>& value_scale, double scale) {
  SoftmaxRead p;
  Inputs in("softmax_read", query, keys, values, slot_mask, slot_range, {key_scale, value_scale}, scale, p);
  in.fill(p);
  Tensor read = empty(in.args.sizes(Side::tokens, {p.T, p.V}), query.scalar_type());
  Tensor lse = empty(in.args.sizes(Side::tokens, {p.T}), stats_type(query.scalar_type()));
  Tensor rest = empty(in.args.sizes(Side::tokens, {p.T}), stats_type(query.scalar_type()));
  p.read = in.args.view(read, 2), p.lse = in.args.view(lse, 1), p.lse_rest = in.args.view(rest, 1);
  MK_CALL(softmax_read, p);
  return {read, lse, rest};
}

Four run_backward(const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& slot_mask,
                  const std::optional<Tensor>& slot_range, const Scales& scales, const Tensor& read, const Tensor& lse,
                  const Tensor& lse_rest, const std::optional<Tensor>& d_read, const std::optional<Tensor>& d_lse,
                  double scale, const std::vector<bool>& wants) {
  SoftmaxReadBackward p;
  SoftmaxRead& f = p.forward;
  Inputs in("softmax_read_backward", query, keys, values, slot_mask, slot_range, scales, scale, f);
  in.args.require(wants.size() == 4, "wants must have 4 entries");
  const SavedRead saved(in.args, *in.query, f.T, f.V, read, lse, lse_rest, d_read, d_lse);
  in.fill(f);
  saved.fill(in.args, p);
  Gradient d_query(in.args, in.query, wants[0], Side::tokens, 2);
  Gradient d_keys(in.args, in.keys, wants[1], Side::memory, 2);
  Gradient d_values(in.args, in.values, wants[2], Side::memory, 2);
  Gradient d_mask(in.args, in.mask, wants[3], Side::memory, 1);
  p.d_query = d_query.view(), p.d_keys = d_keys.view(), p.d_values = d_values.view(), p.d_mask = d_mask.view();
  if (f.lead.batches() * f.lead.folded() * f.T * f.N == 0) {
    for (Gradient* g : {&d_query, &d_keys, &d_values, &d_mask}) g->zero();
  } else {
    MK_CALL(softmax_read_backward, p);
  }
  return {d_query.result(), d_keys.result(), d_values.result(), d_mask.result()};
}

Three forward(const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& slot_mask,
              const std::optional<Tensor>& slot_range, double scale) {
  return run(query, keys, values, slot_mask, slot_range, std::nullopt, std::nullopt, scale);
}

Four backward(const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& slot_mask,
              const std::optional<Tensor>& slot_range, const Tensor& read, const Tensor& lse, const Tensor& lse_rest,
              const std::optional<Tensor>& d_read, const std::optional<Tensor>& d_lse, double scale,
              const std::vector<bool>& wants) {
  return run_backward(query, keys, values, slot_mask, slot_range, {}, read, lse, lse_rest, d_read, d_lse, scale, wants);
}

Two backward_compressed(const Tensor& query, const Tensor& keys, const Tensor& values,
                        const std::optional<Tensor>& slot_mask, const std::optional<Tensor>& slot_range,
                        const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale,
                        const Tensor& read, const Tensor& lse, const Tensor& lse_rest,
                        const std::optional<Tensor>& d_read, const std::optional<Tensor>& d_lse, double scale,
                        const std::vector<bool>& wants) {
  check(wants.size() == 2, "softmax_read_compressed_backward: wants must have 2 entries");
  const Four d = run_backward(query, keys, values, slot_mask, slot_range, {key_scale, value_scale}, read, lse, lse_rest,
                              d_read, d_lse, scale, {wants[0], false, false, wants[1]});
  return {std::get<0>(d), std::get<3>(d)};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "softmax_read", &mk::forward);
  MK_OPERATOR(m, "softmax_read_backward", &mk::backward);
  if (mk::kCompressedSlots) {
    MK_OPERATOR(m, "softmax_read_compressed", &mk::run);
    MK_OPERATOR(m, "softmax_read_compressed_backward", &mk::backward_compressed);
  }
}
