#include "write.h"

namespace mk {
namespace {

using Optional = std::optional<Tensor>;

struct Inputs {
  Arguments args;
  const Tensor *values, *weights, *write, *erase, *token_mask;

  Inputs(const char* op, const Tensor& v, const Tensor& a, const Tensor& w, const Optional& e, const Optional& t,
         double erase_scale, GatedWrite& p)
      : args(op) {
    p.T = size_at(op, "weights", a, -2), p.K = 0;
    p.N = size_at(op, "values", v, -2), p.V = size_at(op, "values", v, -1);
    p.scale = 1, p.erase_scale = erase_scale, p.gate = Gate::given;
    values = &args.add("values", v, Side::memory, {p.N, p.V});
    weights = &args.add("weights", a, Side::tokens, {p.T, p.N});
    write = &args.add("write", w, Side::tokens, {p.T, p.V});
    erase = args.add("erase", e, Side::tokens, {p.T, p.V});
    token_mask = args.add("token_mask", t, Side::tokens, {p.T});
    args.floats({values, weights, write, erase});
    check_write(args, t, erase_scale);
  }
  void fill(GatedWrite& p) {
    p.lead = args.lead();
    p.values = p.keys = args.view(values, 2), p.weights = args.view(weights, 2);
    p.write = args.view(write, 2), p.erase = args.view(erase, 2), p.token_mask = args.view(token_mask, 1);
  }
};

// Kernels take the product of 1 - a along: with gates that are given nobody asks for it.
Tensor unused(Inputs& in, const GatedWrite& p) {
  return empty(in.args.sizes(Side::memory, {p.N}), stats_type(in.weights->scalar_type()));
}

Tensor forward(const Tensor& values, const Tensor& weights, const Tensor& write, const Optional& erase,
               const Optional& token_mask, double erase_scale) {
  GatedWrite p;
  Inputs in("slot_write", values, weights, write, erase, token_mask, erase_scale, p);
  in.fill(p);
  Tensor out = empty(in.args.sizes(Side::memory, {p.N, p.V}), values.scalar_type()), retained = unused(in, p);
  p.out = in.args.view(out, 2), p.retained = in.args.view(retained, 1);
  run_write(p);
  return out;
}

void in_place(const Tensor& values, const Tensor& weights, const Tensor& write, const Optional& erase,
              const Optional& token_mask, double erase_scale) {
  GatedWrite p;
  Inputs in("slot_write_", values, weights, write, erase, token_mask, erase_scale, p);
  in.fill(p);
  check_target(in.args, values, in.args.sizes(Side::memory, {p.N, p.V}));
  Tensor retained = unused(in, p);
  p.out = p.values, p.retained = in.args.view(retained, 1);
  run_write(p);
  settle_target(*in.values, values);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& values, const Tensor& weights, const Tensor& write,
                                                    const Optional& erase, const Optional& token_mask,
                                                    const Optional& d_values, double erase_scale,
                                                    const std::vector<bool>& wants) {
  GatedWriteBackward b;
  GatedWrite& p = b.forward;
  Inputs in("slot_write_backward", values, weights, write, erase, token_mask, erase_scale, p);
  in.args.require(wants.size() == 4, "wants must have 4 entries");
  in.args.require(d_values.has_value(), "d_values must be given");
  const Tensor* du = in.args.add("d_values", d_values, Side::memory, {p.N, p.V});
  in.args.floats({in.weights, du});
  in.fill(p);
  b.d_out = in.args.view(du, 2);
  Gradient dv(in.args, in.values, wants[0], Side::memory, 2);
  const Gradient da(in.args, in.weights, wants[1], Side::tokens, 2);
  Gradient dw(in.args, in.write, wants[2], Side::tokens, 2), de(in.args, in.erase, wants[3], Side::tokens, 2);
  b.d_values = dv.view(), b.d_weights = da.view(), b.d_write = dw.view(), b.d_erase = de.view();
  if (p.lead.batches() * p.N == 0) {
    for (Gradient* g : {&dv, &dw, &de}) g->zero();
  } else {
    run_write_backward(b);
  }
  return {dv.result(), da.result(), dw.result(), de.result()};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "slot_write", &mk::forward);
  MK_OPERATOR(m, "slot_write_", &mk::in_place);
  MK_OPERATOR(m, "slot_write_backward", &mk::backward);
}
