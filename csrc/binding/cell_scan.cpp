#include "params/cell_scan.h"

#include "binding/binding.h"

namespace mk {
namespace {

using Optional = std::optional<Tensor>;

// Guards the inputs and fills everything of `p` but the result.
struct Inputs {
  Arguments args;
  const Tensor *inputs, *weight, *initial;

  Inputs(const char* op, const Tensor& x, const Tensor& w, const Optional& h, CellScan& p) : args(op) {
    p.T = size_at(op, "inputs", x, -2), p.D = size_at(op, "weight", w, -1);
    inputs = &args.add("inputs", x, Side::tokens, {p.T, 3 * p.D});
    weight = &args.add("weight", w, Side::memory, {3 * p.D, p.D});
    initial = args.add("initial", h, Side::tokens, {p.D});
    args.floats({inputs, weight, initial});
  }
  void fill(CellScan& p) {
    p.lead = args.lead();
    p.inputs = args.view(inputs, 2), p.weight = args.view(weight, 2), p.initial = args.view(initial, 1);
  }
};

Tensor forward(const Tensor& inputs, const Tensor& weight, const Optional& initial) {
  CellScan p;
  Inputs in("cell_scan", inputs, weight, initial, p);
  in.fill(p);
  Tensor states = empty(in.args.sizes(Side::tokens, {p.T, p.D}), inputs.scalar_type());
  p.states = in.args.view(states, 2);
  if (states.numel() > 0) MK_CALL(cell_scan, p);
  return states;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& inputs, const Tensor& weight, const Optional& initial,
                                            const Tensor& states, const Optional& d_states,
                                            const std::vector<bool>& wants) {
  CellScanBackward b;
  CellScan& p = b.forward;
  Inputs in("cell_scan_backward", inputs, weight, initial, p);
  in.args.require(wants.size() == 3, "wants must have 3 entries");
  in.args.require(d_states.has_value(), "d_states must be given");
  const Tensor& h = in.args.add("states", states, Side::tokens, {p.T, p.D});
  const Tensor* dh = in.args.add("d_states", d_states, Side::tokens, {p.T, p.D});
  in.args.floats({in.inputs, &h, dh});
  in.fill(p);
  p.states = in.args.view(h, 2), b.d_states = in.args.view(dh, 2);
  Gradient dx(in.args, in.inputs, wants[0], Side::tokens, 2), dw(in.args, in.weight, wants[1], Side::memory, 2);
  Gradient d0(in.args, in.initial, wants[2], Side::tokens, 1);
  b.d_inputs = dx.view(), b.d_weight = dw.view(), b.d_initial = d0.view();
  if (p.T * p.D * p.lead.folded() * p.lead.batches() > 0) {
    MK_CALL(cell_scan_backward, b);
  } else {
    for (Gradient* g : {&dx, &dw, &d0}) g->zero();
  }
  return {dx.result(), dw.result(), d0.result()};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "cell_scan", &mk::forward);
  MK_OPERATOR(m, "cell_scan_backward", &mk::backward);
}
