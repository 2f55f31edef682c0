#include "params/memory_gate.h"

#include "binding/binding.h"

namespace mk {
namespace {

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Checks the inputs and fills in `p`, except for the results.
struct Inputs {
  Arguments args;
  const Tensor *hidden, *key, *value, *hidden_weight, *key_weight;

  Inputs(const char* op, const Tensor& h, const Tensor& k, const Tensor& v, const Tensor& wh, const Tensor& wk,
         double eps, bool signed_sqrt, MemoryGate& p)
      : args(op) {
    p.B = size_at(op, "hidden", h, -2), p.D = size_at(op, "hidden", h, -1);
    p.eps = eps, p.signed_sqrt = signed_sqrt;
    hidden = &args.add("hidden", h, Side::tokens, {p.B, p.D});
    key = &args.add("key", k, Side::tokens, {p.B, p.D});
    value = &args.add("value", v, Side::tokens, {p.D});
    hidden_weight = &args.add("hidden_weight", wh, Side::memory, {p.B, p.D});
    key_weight = &args.add("key_weight", wk, Side::memory, {p.B, p.D});
    args.floats({hidden, key, value, hidden_weight, key_weight});
    args.require(k.scalar_type() == h.scalar_type() && v.scalar_type() == h.scalar_type(),
                 "key and value must have the dtype of hidden");
    args.require(wh.dim() == 2 && wk.dim() == 2, "the weights must have 2 dimensions");
  }
  void fill(MemoryGate& p) {
    p.lead = args.lead();
    p.hidden = args.view(hidden, 2), p.key = args.view(key, 2), p.value = args.view(value, 1);
    p.hidden_weight = args.view(hidden_weight, 2), p.key_weight = args.view(key_weight, 2);
  }
  // A result with a number per branch.
  Tensor numbers(const MemoryGate& p) {
    return empty(args.sizes(Side::tokens, {p.B}), stats_type(hidden->scalar_type()));
  }
};

Four forward(const Tensor& hidden, const Tensor& key, const Tensor& value, const Tensor& hidden_weight,
             const Tensor& key_weight, double eps, bool signed_sqrt) {
  MemoryGate p;
  Inputs in("memory_gate", hidden, key, value, hidden_weight, key_weight, eps, signed_sqrt, p);
  in.fill(p);
  const Tensor gated = empty(in.args.sizes(Side::tokens, {p.B, p.D}), hidden.scalar_type());
  const Tensor hidden_rstd = in.numbers(p), key_rstd = in.numbers(p), score = in.numbers(p);
  p.gated = in.args.view(gated, 2);
  p.hidden_rstd = in.args.view(hidden_rstd, 1), p.key_rstd = in.args.view(key_rstd, 1);
  p.score = in.args.view(score, 1);
  MK_CALL(memory_gate, p);
  return {gated, hidden_rstd, key_rstd, score};
}

Five backward(const Tensor& hidden, const Tensor& key, const Tensor& value, const Tensor& hidden_weight,
              const Tensor& key_weight, const Tensor& hidden_rstd, const Tensor& key_rstd, const Tensor& score,
              const std::optional<Tensor>& d_gated, double eps, bool signed_sqrt, const std::vector<bool>& wants) {
  MemoryGateBackward b;
  MemoryGate& p = b.forward;
  Inputs in("memory_gate_backward", hidden, key, value, hidden_weight, key_weight, eps, signed_sqrt, p);
  in.args.require(wants.size() == 5, "wants must have 5 entries");
  in.args.require(d_gated.has_value(), "d_gated must be given");
  const Tensor* d = in.args.add("d_gated", d_gated, Side::tokens, {p.B, p.D});
  const Tensor* stats[3] = {&in.args.add("hidden_rstd", hidden_rstd, Side::tokens, {p.B}),
                            &in.args.add("key_rstd", key_rstd, Side::tokens, {p.B}),
                            &in.args.add("score", score, Side::tokens, {p.B})};
  in.args.require(d->scalar_type() == hidden.scalar_type(), "d_gated must have the dtype of hidden");
  in.args.stats({stats[0], stats[1], stats[2]}, hidden);
  in.fill(p);
  p.hidden_rstd = in.args.view(stats[0], 1), p.key_rstd = in.args.view(stats[1], 1),
  p.score = in.args.view(stats[2], 1);
  b.d_gated = in.args.view(d, 2);
  Gradient d_hidden(in.args, in.hidden, wants[0], Side::tokens, 2, true);
  Gradient d_key(in.args, in.key, wants[1], Side::tokens, 2, true);
  Gradient d_value(in.args, in.value, wants[2], Side::tokens, 1, true);
  const Gradient d_hidden_weight(in.args, in.hidden_weight, wants[3], Side::memory, 2);
  const Gradient d_key_weight(in.args, in.key_weight, wants[4], Side::memory, 2);
  b.d_hidden = d_hidden.view(), b.d_key = d_key.view(), b.d_value = d_value.view();
  b.d_hidden_weight = d_hidden_weight.view(), b.d_key_weight = d_key_weight.view();
  MK_CALL(memory_gate_backward, b);
  return {d_hidden.result(), d_key.result(), d_value.result(), d_hidden_weight.result(), d_key_weight.result()};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "memory_gate", &mk::forward);
  MK_OPERATOR(m, "memory_gate_backward", &mk::backward);
}
