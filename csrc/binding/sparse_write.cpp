#include "params/sparse_write.h"

#include "binding/chosen_slots.h"
#include "binding/write.h"

namespace mk {
namespace {

using Optional = std::optional<Tensor>;

struct Inputs {
  Arguments args;
  const Tensor *values, *indices, *weights, *write, *erase, *token_mask;

  Inputs(const char* op, const Tensor& v, const Tensor& i, const Tensor& a, const Tensor& w, const Optional& e,
         const Optional& mask, double erase_scale, SparseWrite& p)
      : args(op) {
    Choice& c = p.choice;
    c.N = size_at(op, "values", v, -2), p.V = size_at(op, "values", v, -1);
    c.T = size_at(op, "indices", i, -2), c.k = size_at(op, "indices", i, -1);
    p.erase_scale = erase_scale;
    values = &args.add("values", v, Side::memory, {c.N, p.V});
    indices = &args.add("indices", i, Side::tokens, {c.T, c.k});
    weights = &args.add("weights", a, Side::tokens, {c.T, c.k});
    write = &args.add("write", w, Side::tokens, {c.T, p.V});
    erase = args.add("erase", e, Side::tokens, {c.T, p.V});
    token_mask = args.add("token_mask", mask, Side::tokens, {c.T});
    args.floats({values, weights, write, erase});
    args.require(indices->scalar_type() == ScalarType::Long, "indices must be int64");
    check_write(args, mask, erase_scale);
  }
  void fill(SparseWrite& p) {
    p.choice.lead = args.lead();
    p.choice.indices = args.view(indices, 2);
    p.values = args.view(values, 2), p.weights = args.view(weights, 2);
    p.write = args.view(write, 2), p.erase = args.view(erase, 2);
    p.token_mask = args.view(token_mask, 1);
    check_indices(args.op(), p.choice);
  }
};

Tensor forward(const Tensor& values, const Tensor& indices, const Tensor& weights, const Tensor& write,
               const Optional& erase, const Optional& token_mask, double erase_scale) {
  SparseWrite p;
  Inputs in("sparse_write", values, indices, weights, write, erase, token_mask, erase_scale, p);
  in.fill(p);
  Tensor out = empty(in.args.sizes(Side::memory, {p.choice.N, p.V}), values.scalar_type());
  p.out = in.args.view(out, 2);
  if (out.numel() != 0) MK_CALL(sparse_write, p);
  return out;
}

void in_place(const Tensor& values, const Tensor& indices, const Tensor& weights, const Tensor& write,
              const Optional& erase, const Optional& token_mask, double erase_scale) {
  SparseWrite p;
  Inputs in("sparse_write_", values, indices, weights, write, erase, token_mask, erase_scale, p);
  in.fill(p);
  check_target(in.args, values, in.args.sizes(Side::memory, {p.choice.N, p.V}));
  p.out = p.values;
  if (values.numel() != 0) MK_CALL(sparse_write, p);
  settle_target(*in.values, values);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& values, const Tensor& indices, const Tensor& weights,
                                                    const Tensor& write, const Optional& erase,
                                                    const Optional& token_mask, const Optional& d_values,
                                                    double erase_scale, const std::vector<bool>& wants) {
  SparseWriteBackward b;
  SparseWrite& p = b.forward;
  Inputs in("sparse_write_backward", values, indices, weights, write, erase, token_mask, erase_scale, p);
  in.args.require(wants.size() == 4, "wants must have 4 entries");
  in.args.require(d_values.has_value(), "d_values must be given");
  const Tensor* du = in.args.add("d_values", d_values, Side::memory, {p.choice.N, p.V});
  in.args.require(du->scalar_type() == values.scalar_type(), "d_values must have the dtype of values");
  in.fill(p);
  b.d_out = in.args.view(du, 2);
  Tensor dv = nothing();
  if (wants[0]) {
    dv = empty(in.args.sizes(Side::memory, {p.choice.N, p.V}), values.scalar_type());
    b.d_values = in.args.view(dv, 2);
  }
  const Gradient da(in.args, in.weights, wants[1], Side::tokens, 2);
  Gradient dw(in.args, in.write, wants[2], Side::tokens, 2), de(in.args, in.erase, wants[3], Side::tokens, 2);
  b.d_weights = da.view(), b.d_write = dw.view(), b.d_erase = de.view();
  if (p.choice.lead.batches() == 0) {
    for (Gradient* g : {&dw, &de}) g->zero();
  } else {
    MK_CALL(sparse_write_backward, b);
  }
  return {dv, da.result(), dw.result(), de.result()};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "sparse_write", &mk::forward);
  MK_OPERATOR(m, "sparse_write_", &mk::in_place);
  MK_OPERATOR(m, "sparse_write_backward", &mk::backward);
}
