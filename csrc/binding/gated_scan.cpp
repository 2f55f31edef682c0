#include "params/gated_scan.h"

#include "binding/binding.h"

namespace mk {
namespace {

using Optional = std::optional<Tensor>;

// Guards the inputs and fills everything of `p` but the result.
struct Inputs {
  Arguments args;
  const Tensor *forget, *update, *initial;

  Inputs(const char* op, const Tensor& f, const Tensor& u, const Optional& h, GatedScan& p) : args(op) {
    p.T = size_at(op, "forget", f, -2), p.D = size_at(op, "forget", f, -1);
    forget = &args.add("forget", f, Side::tokens, {p.T, p.D});
    update = &args.add("update", u, Side::tokens, {p.T, p.D});
    initial = args.add("initial", h, Side::tokens, {p.D});
    args.floats({forget, update, initial});
  }
  void fill(GatedScan& p) {
    p.lead = args.lead();
    p.forget = args.view(forget, 2), p.update = args.view(update, 2), p.initial = args.view(initial, 1);
  }
};

Tensor forward(const Tensor& forget, const Tensor& update, const Optional& initial) {
  GatedScan p;
  Inputs in("gated_scan", forget, update, initial, p);
  in.fill(p);
  Tensor states = empty(in.args.sizes(Side::tokens, {p.T, p.D}), update.scalar_type());
  p.states = in.args.view(states, 2);
  if (states.numel() > 0) MK_CALL(gated_scan, p);
  return states;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& forget, const Tensor& update, const Optional& initial,
                                            const Tensor& states, const Optional& d_states,
                                            const std::vector<bool>& wants) {
  GatedScanBackward b;
  GatedScan& p = b.forward;
  Inputs in("gated_scan_backward", forget, update, initial, p);
  in.args.require(wants.size() == 3, "wants must have 3 entries");
  in.args.require(d_states.has_value(), "d_states must be given");
  const Tensor& h = in.args.add("states", states, Side::tokens, {p.T, p.D});
  const Tensor* dh = in.args.add("d_states", d_states, Side::tokens, {p.T, p.D});
  in.args.floats({in.forget, &h, dh});
  in.fill(p);
  p.states = in.args.view(h, 2), b.d_states = in.args.view(dh, 2);
  Gradient df(in.args, in.forget, wants[0], Side::tokens, 2), du(in.args, in.update, wants[1], Side::tokens, 2);
  Gradient d0(in.args, in.initial, wants[2], Side::tokens, 1);
  b.d_forget = df.view(), b.d_update = du.view(), b.d_initial = d0.view();
  if (p.T * p.D * p.lead.folded() > 0) MK_CALL(gated_scan_backward, b);
  else d0.zero();
  return {df.result(), du.result(), d0.result()};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "gated_scan", &mk::forward);
  MK_OPERATOR(m, "gated_scan_backward", &mk::backward);
}
