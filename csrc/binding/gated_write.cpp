#include "params/gated_write.h"

#include "binding/write.h"

namespace mk {
namespace {

using Optional = std::optional<Tensor>;

struct Inputs {
  std::string name;
  Arguments args;
  const Tensor *values, *keys, *query, *write, *erase, *mask, *token_mask;

  Inputs(const std::string& op_name, const Tensor& v, const Tensor& k, const Tensor& q, const Tensor& w,
         const Optional& e, const Optional& m, const Optional& t, double scale, double erase_scale, GatedWrite& p)
      : name(op_name), args(name.c_str()) {
    const char* op = args.op();
    p.T = size_at(op, "query", q, -2), p.K = size_at(op, "query", q, -1);
    p.N = size_at(op, "values", v, -2), p.V = size_at(op, "values", v, -1);
    p.scale = scale, p.erase_scale = erase_scale;
    values = &args.add("values", v, Side::memory, {p.N, p.V});
    keys = &args.add("keys", k, Side::memory, {p.N, p.K});
    query = &args.add("query", q, Side::tokens, {p.T, p.K});
    write = &args.add("write", w, Side::tokens, {p.T, p.V});
    erase = args.add("erase", e, Side::tokens, {p.T, p.V});
    mask = args.add("slot_mask", m, Side::memory, {p.N});
    token_mask = args.add("token_mask", t, Side::tokens, {p.T});
    args.floats({values, keys, query, write, erase});
    args.mask(mask, *query);
    check_write(args, t, erase_scale);
  }
  void fill(GatedWrite& p, Gate gate) {
    p.gate = gate;
    p.lead = args.lead();
    p.values = args.view(values, 2), p.keys = args.view(keys, 2), p.query = args.view(query, 2);
    p.write = args.view(write, 2), p.erase = args.view(erase, 2);
    p.mask = args.view(mask, 1), p.token_mask = args.view(token_mask, 1);
  }
};

// gated_write and softmax_write differ in their gates alone.
template <Gate kGate>
struct Write {
  static std::string name(const char* suffix) {
    return std::string(kGate == Gate::softmax ? "softmax_write" : "gated_write") + suffix;
  }

  static std::tuple<Tensor, Tensor> forward(const Tensor& values, const Tensor& keys, const Tensor& query,
                                            const Tensor& write, const Optional& erase, const Optional& slot_mask,
                                            const Optional& token_mask, double scale, double erase_scale) {
    GatedWrite p;
    Inputs in(name(""), values, keys, query, write, erase, slot_mask, token_mask, scale, erase_scale, p);
    in.fill(p, kGate);
    Tensor out = empty(in.args.sizes(Side::memory, {p.N, p.V}), values.scalar_type());
    Tensor retained = empty(in.args.sizes(Side::memory, {p.N}), stats_type(query.scalar_type()));
    p.out = in.args.view(out, 2), p.retained = in.args.view(retained, 1);
    run_write(p);
    return {out, retained};
  }

  static Tensor in_place(const Tensor& values, const Tensor& keys, const Tensor& query, const Tensor& write,
                         const Optional& erase, const Optional& slot_mask, const Optional& token_mask, double scale,
                         double erase_scale) {
    GatedWrite p;
    Inputs in(name("_"), values, keys, query, write, erase, slot_mask, token_mask, scale, erase_scale, p);
    in.fill(p, kGate);
    check_target(in.args, values, in.args.sizes(Side::memory, {p.N, p.V}));
    Tensor retained = empty(in.args.sizes(Side::memory, {p.N}), stats_type(query.scalar_type()));
    p.out = p.values, p.retained = in.args.view(retained, 1);
    run_write(p);
    settle_target(*in.values, values);
    return retained;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
      const Tensor& values, const Tensor& keys, const Tensor& query, const Tensor& write, const Optional& erase,
      const Optional& slot_mask, const Optional& token_mask, const Tensor& retained, const Optional& d_values,
      const Optional& d_retained, double scale, double erase_scale, const std::vector<bool>& wants) {
    GatedWriteBackward b;
    GatedWrite& p = b.forward;
    Inputs in(name("_backward"), values, keys, query, write, erase, slot_mask, token_mask, scale, erase_scale, p);
    in.args.require(wants.size() == 6, "wants must have 6 entries");
    Sizes out(retained.sizes().begin(), retained.sizes().end());
    out.push_back(p.V);
    const Tensor given = upstream(d_values, out, values.scalar_type());
    const Tensor* du = &in.args.add("d_values", given, Side::memory, {p.N, p.V});
    const Tensor* r = &in.args.add("retained", retained, Side::memory, {p.N});
    const Tensor* dr = in.args.add("d_retained", d_retained, Side::memory, {p.N});
    in.args.floats({in.query, du, r, dr});
    in.args.stats({r, dr}, query);
    in.fill(p, kGate);
    b.d_out = in.args.view(du, 2), p.retained = in.args.view(r, 1), b.d_retained = in.args.view(dr, 1);
    Gradient dv(in.args, in.values, wants[0], Side::memory, 2), dk(in.args, in.keys, wants[1], Side::memory, 2);
    Gradient dq(in.args, in.query, wants[2], Side::tokens, 2), dw(in.args, in.write, wants[3], Side::tokens, 2);
    Gradient de(in.args, in.erase, wants[4], Side::tokens, 2), dm(in.args, in.mask, wants[5], Side::memory, 1);
    b.d_values = dv.view(), b.d_keys = dk.view(), b.d_query = dq.view(), b.d_write = dw.view();
    b.d_erase = de.view(), b.d_mask = dm.view();
    if (p.lead.batches() * p.N == 0) {
      for (Gradient* g : {&dv, &dk, &dq, &dw, &de, &dm}) g->zero();
    } else {
      if (p.lead.folded() * p.T == 0) {  // dV passes through below; nothing else is touched by a token
        for (Gradient* g : {&dk, &dm}) g->zero();
        b.d_keys = b.d_mask = View{};
      }
      run_write_backward(b);
    }
    return {dv.result(), dk.result(), dq.result(), dw.result(), de.result(), dm.result()};
  }
};

using Gated = Write<Gate::sigmoid>;
using Soft = Write<Gate::softmax>;

// slot_write: the gates are given.
struct SlotInputs {
  Arguments args;
  const Tensor *values, *weights, *write, *erase, *token_mask;

  SlotInputs(const char* op, const Tensor& v, const Tensor& a, const Tensor& w, const Optional& e, const Optional& t,
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

// Kernels take the product of 1 - a along: with gates that are given nothing reads it.
Tensor unused(SlotInputs& in, const GatedWrite& p) {
  return empty(in.args.sizes(Side::memory, {p.N}), stats_type(in.weights->scalar_type()));
}

Tensor slot_write(const Tensor& values, const Tensor& weights, const Tensor& write, const Optional& erase,
                  const Optional& token_mask, double erase_scale) {
  GatedWrite p;
  SlotInputs in("slot_write", values, weights, write, erase, token_mask, erase_scale, p);
  in.fill(p);
  Tensor out = empty(in.args.sizes(Side::memory, {p.N, p.V}), values.scalar_type()), retained = unused(in, p);
  p.out = in.args.view(out, 2), p.retained = in.args.view(retained, 1);
  run_write(p);
  return out;
}

void slot_write_in_place(const Tensor& values, const Tensor& weights, const Tensor& write, const Optional& erase,
                         const Optional& token_mask, double erase_scale) {
  GatedWrite p;
  SlotInputs in("slot_write_", values, weights, write, erase, token_mask, erase_scale, p);
  in.fill(p);
  check_target(in.args, values, in.args.sizes(Side::memory, {p.N, p.V}));
  Tensor retained = unused(in, p);
  p.out = p.values, p.retained = in.args.view(retained, 1);
  run_write(p);
  settle_target(*in.values, values);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> slot_write_backward(const Tensor& values, const Tensor& weights,
                                                               const Tensor& write, const Optional& erase,
                                                               const Optional& token_mask, const Optional& d_values,
                                                               double erase_scale, const std::vector<bool>& wants) {
  GatedWriteBackward b;
  GatedWrite& p = b.forward;
  SlotInputs in("slot_write_backward", values, weights, write, erase, token_mask, erase_scale, p);
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
  MK_OPERATOR(m, "gated_write", &mk::Gated::forward);
  MK_OPERATOR(m, "gated_write_", &mk::Gated::in_place);
  MK_OPERATOR(m, "gated_write_backward", &mk::Gated::backward);
  MK_OPERATOR(m, "softmax_write", &mk::Soft::forward);
  MK_OPERATOR(m, "softmax_write_", &mk::Soft::in_place);
  MK_OPERATOR(m, "softmax_write_backward", &mk::Soft::backward);
  MK_OPERATOR(m, "slot_write", &mk::slot_write);
  MK_OPERATOR(m, "slot_write_", &mk::slot_write_in_place);
  MK_OPERATOR(m, "slot_write_backward", &mk::slot_write_backward);
}
