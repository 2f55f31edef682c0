#include "params/address.h"

#include "binding/binding.h"
#include "params/softmax_read.h"

namespace mk {
namespace {

struct Inputs {
  Arguments args;
  const Tensor *query, *keys, *mask, *range;

  Inputs(const char* op, const Tensor& q, const Tensor& k, const std::optional<Tensor>& m,
         const std::optional<Tensor>& r, double scale, bool sigmoid, Address& p)
      : args(op) {
    p.T = size_at(op, "query", q, -2), p.K = size_at(op, "query", q, -1), p.N = size_at(op, "keys", k, -2);
    p.scale = scale, p.sigmoid = sigmoid;
    query = &args.add("query", q, Side::tokens, {p.T, p.K});
    keys = &args.add("keys", k, Side::memory, {p.N, p.K});
    mask = args.add("slot_mask", m, Side::memory, {p.N});
    range = args.ranges(r, p.T);
    args.floats({query, keys});
    args.mask(mask, *query);
  }
  void fill(Address& p) {
    p.lead = args.lead();
    p.query = args.view(query, 2), p.keys = args.view(keys, 2), p.mask = args.view(mask, 1);
    p.range = args.view(range, 2);
  }
};

Tensor forward(const Tensor& query, const Tensor& keys, const std::optional<Tensor>& slot_mask,
               const std::optional<Tensor>& slot_range, double scale, bool sigmoid) {
  Address p;
  Inputs in("address", query, keys, slot_mask, slot_range, scale, sigmoid, p);
  in.fill(p);
  Tensor weights = empty(in.args.sizes(Side::tokens, {p.T, p.N}), query.scalar_type());
  p.weights = in.args.view(weights, 2);
  if (weights.numel() == 0) return weights;
  if (sigmoid || kWeighsInOnePass) {
    MK_CALL(address, p);
    return weights;
  }
  Tensor lse = empty(in.args.sizes(Side::tokens, {p.T}), stats_type(query.scalar_type()));
  Tensor rest = empty(in.args.sizes(Side::tokens, {p.T}), stats_type(query.scalar_type()));
  p.lse = in.args.view(lse, 1), p.lse_rest = in.args.view(rest, 1);
  SoftmaxRead r{p.lead, p.T, p.N, p.K, 0, p.query, p.keys, {}, p.mask, p.range, {}, p.lse, p.lse_rest, p.scale};
  MK_CALL(softmax_read, r);
  MK_CALL(address, p);
  return weights;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& query, const Tensor& keys,
                                            const std::optional<Tensor>& slot_mask,
                                            const std::optional<Tensor>& slot_range, const Tensor& weights,
                                            const std::optional<Tensor>& d_weights, double scale, bool sigmoid,
                                            const std::vector<bool>& wants) {
  AddressBackward p;
  Address& f = p.forward;
  Inputs in("address_backward", query, keys, slot_mask, slot_range, scale, sigmoid, f);
  in.args.require(wants.size() == 3, "wants must have 3 entries");
  in.args.require(d_weights.has_value(), "d_weights must be given");
  const Tensor* w = &in.args.add("weights", weights, Side::tokens, {f.T, f.N});
  const Tensor* dw = &in.args.add("d_weights", *d_weights, Side::tokens, {f.T, f.N});
  in.args.floats({in.query, w, dw});
  in.fill(f);
  f.weights = in.args.view(w, 2), p.d_weights = in.args.view(dw, 2);
  Gradient d_query(in.args, in.query, wants[0], Side::tokens, 2), d_keys(in.args, in.keys, wants[1], Side::memory, 2);
  Gradient d_mask(in.args, in.mask, wants[2], Side::memory, 1);
  p.d_query = d_query.view(), p.d_keys = d_keys.view(), p.d_mask = d_mask.view();
  if (f.lead.batches() * f.lead.folded() * f.T * f.N == 0) {
    for (Gradient* g : {&d_query, &d_keys, &d_mask}) g->zero();
  } else {
    MK_CALL(address_backward, p);
  }
  return {d_query.result(), d_keys.result(), d_mask.result()};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "address", &mk::forward);
  MK_OPERATOR(m, "address_backward", &mk::backward);
}
