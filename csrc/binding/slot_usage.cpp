#include "params/slot_usage.h"

#include "binding/binding.h"

namespace mk {
namespace {

struct Inputs {
  Arguments args;
  const Tensor *query, *keys, *lse, *mask, *range;

  Inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& l, const std::optional<Tensor>& m,
         const std::optional<Tensor>& r, double scale, SlotUsage& p)
      : args(op) {
    p.T = size_at(op, "query", q, -2), p.K = size_at(op, "query", q, -1), p.N = size_at(op, "keys", k, -2);
    p.scale = scale;
    query = &args.add("query", q, Side::tokens, {p.T, p.K});
    keys = &args.add("keys", k, Side::memory, {p.N, p.K});
    lse = &args.add("lse", l, Side::tokens, {p.T});
    mask = args.add("slot_mask", m, Side::memory, {p.N});
    range = args.ranges(r, p.T);
    args.floats({query, keys, lse});
    args.stats({lse}, q);
    args.mask(mask, *query);
  }
  void fill(SlotUsage& p) {
    p.lead = args.lead();
    p.query = args.view(query, 2), p.keys = args.view(keys, 2), p.lse = args.view(lse, 1), p.mask = args.view(mask, 1);
    p.range = args.view(range, 2);
  }
};

bool empty_call(const SlotUsage& p) { return p.lead.batches() * p.lead.folded() * p.T * p.N == 0; }

Tensor forward(const Tensor& query, const Tensor& keys, const Tensor& lse, const std::optional<Tensor>& slot_mask,
               const std::optional<Tensor>& slot_range, double scale) {
  SlotUsage p;
  Inputs in("slot_usage", query, keys, lse, slot_mask, slot_range, scale, p);
  in.fill(p);
  Tensor usage = empty(in.args.sizes(Side::memory, {p.N}), stats_type(query.scalar_type()));
  p.usage = in.args.view(usage, 1);
  if (empty_call(p)) return torch::stable::zero_(usage);
  MK_CALL(slot_usage, p);
  return usage;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& query, const Tensor& keys, const Tensor& lse,
                                                    const std::optional<Tensor>& slot_mask,
                                                    const std::optional<Tensor>& slot_range,
                                                    const std::optional<Tensor>& d_usage, double scale,
                                                    const std::vector<bool>& wants) {
  SlotUsageBackward p;
  SlotUsage& f = p.forward;
  Inputs in("slot_usage_backward", query, keys, lse, slot_mask, slot_range, scale, f);
  in.args.require(wants.size() == 4, "wants must have 4 entries");
  in.args.require(d_usage.has_value(), "d_usage must be given");
  const Tensor* du = &in.args.add("d_usage", *d_usage, Side::memory, {f.N});
  in.args.stats({du}, query);
  in.fill(f);
  p.d_usage = in.args.view(du, 1);
  Gradient d_query(in.args, in.query, wants[0], Side::tokens, 2), d_keys(in.args, in.keys, wants[1], Side::memory, 2);
  Gradient d_lse(in.args, in.lse, wants[2], Side::tokens, 1), d_mask(in.args, in.mask, wants[3], Side::memory, 1);
  p.d_query = d_query.view(), p.d_keys = d_keys.view(), p.d_lse = d_lse.view(), p.d_mask = d_mask.view();
  if (empty_call(f)) {
    for (Gradient* g : {&d_query, &d_keys, &d_lse, &d_mask}) g->zero();
  } else {
    MK_CALL(slot_usage_backward, p);
  }
  return {d_query.result(), d_keys.result(), d_lse.result(), d_mask.result()};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "slot_usage", &mk::forward);
  MK_OPERATOR(m, "slot_usage_backward", &mk::backward);
}
