#include "cpu/softmax_read.h"

#include "binding.h"

namespace mk {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Guards the inputs and fills everything of `p` but the results.
struct Inputs {
  Arguments args;
  const Tensor *query, *keys, *values, *mask;

  Inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& m, double scale,
         SoftmaxRead& p)
      : args(op) {
    p.T = size_at(op, "query", q, -2), p.K = size_at(op, "query", q, -1);
    p.N = size_at(op, "keys", k, -2), p.V = size_at(op, "values", v, -1);
    p.scale = scale;
    args.reserve(8);
    query = &args.add("query", q, Side::tokens, {p.T, p.K});
    keys = &args.add("keys", k, Side::memory, {p.N, p.K});
    values = &args.add("values", v, Side::memory, {p.N, p.V});
    mask = args.add("slot_mask", m, Side::memory, {p.N});
    args.floats({query, keys, values});
    args.mask(mask, *query);
  }
  void fill(SoftmaxRead& p) {
    p.lead = args.lead();
    p.query = args.view(query, 2), p.keys = args.view(keys, 2), p.values = args.view(values, 2);
    p.mask = args.view(mask, 1);
  }
};

Two forward(const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& slot_mask,
            double scale) {
  SoftmaxRead p;
  Inputs in("softmax_read", query, keys, values, slot_mask, scale, p);
  in.fill(p);
  Tensor read = empty(in.args.sizes(Side::tokens, {p.T, p.V}), query.scalar_type());
  Tensor lse = empty(in.args.sizes(Side::tokens, {p.T}), stats_type(query.scalar_type()));
  p.read = in.args.view(read, 2), p.lse = in.args.view(lse, 1);
  MK_CALL(softmax_read, p);
  return {read, lse};
}

}  // namespace
}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(memkernels_cpu, CPU, m) {
  m.impl("softmax_read", TORCH_BOX(&mk::forward));
}
