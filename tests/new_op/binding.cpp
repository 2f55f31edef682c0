#include "binding/binding.h"

#include "params/decay_read.h"

namespace mk {
namespace {

struct Inputs {
  Arguments args;
  const Tensor *query, *keys, *values, *decay;

  Inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& d, double gain, DecayRead& p)
      : args(op) {
    p.T = size_at(op, "query", q, -2), p.K = size_at(op, "query", q, -1);
    p.N = size_at(op, "values", v, -2), p.V = size_at(op, "values", v, -1);
    p.gain = gain;
    query = &args.add("query", q, Side::tokens, {p.T, p.K});
    keys = &args.add("keys", k, Side::memory, {p.N, p.K});
    values = &args.add("values", v, Side::memory, {p.N, p.V});
    decay = &args.add("decay", d, Side::memory, {p.N});
    args.floats({query, keys, values, decay});
  }
  void fill(DecayRead& p) {
    p.lead = args.lead();
    p.query = args.view(query, 2), p.keys = args.view(keys, 2), p.values = args.view(values, 2);
    p.decay = args.view(decay, 1);
  }
};

Tensor forward(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& decay, double gain) {
  DecayRead p;
  Inputs in("decay_read", query, keys, values, decay, gain, p);
  in.fill(p);
  Tensor read = empty(in.args.sizes(Side::tokens, {p.T, p.V}), query.scalar_type());
  p.read = in.args.view(read, 2);
  if (read.numel() > 0) MK_CALL(decay_read, p);
  return read;
}

[[maybe_unused]] std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& query, const Tensor& keys,
                                                                     const Tensor& values, const Tensor& decay,
                                                                     const std::optional<Tensor>& d_read, double gain,
                                                                     const std::vector<bool>& wants) {
  DecayReadBackward b;
  DecayRead& p = b.forward;
  Inputs in("decay_read_backward", query, keys, values, decay, gain, p);
  in.args.require(wants.size() == 4, "wants must have 4 entries");
  in.args.require(d_read.has_value(), "d_read must be given");
  const Tensor* d = in.args.add("d_read", d_read, Side::tokens, {p.T, p.V});
  in.args.floats({in.query, d});
  in.fill(p);
  b.d_read = in.args.view(d, 2);
  Gradient dq(in.args, in.query, wants[0], Side::tokens, 2), dk(in.args, in.keys, wants[1], Side::memory, 2);
  Gradient dv(in.args, in.values, wants[2], Side::memory, 2), dd(in.args, in.decay, wants[3], Side::memory, 1);
  b.d_query = dq.view(), b.d_keys = dk.view(), b.d_values = dv.view(), b.d_decay = dd.view();
  for (Gradient* gradient : {&dq, &dk, &dv, &dd}) gradient->zero();
  if (p.T * p.N * p.lead.batches() * p.lead.folded() > 0) MK_CALL(decay_read_backward, b);
  return {dq.result(), dk.result(), dv.result(), dd.result()};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "decay_read", &mk::forward);
  MK_OPERATOR(m, "decay_read_backward", &mk::backward);
}
