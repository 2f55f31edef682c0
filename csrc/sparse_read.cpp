#include "cpu/sparse_read.h"

#include "chosen.h"

namespace mk {
namespace {

// Guards the inputs and fills everything of `p` but the result.
struct Inputs {
  Arguments args;
  const Tensor *values, *indices, *weights;

  Inputs(const char* op, const Tensor& v, const Tensor& i, const Tensor& w, SparseRead& p) : args(op) {
    Choice& c = p.choice;
    c.N = size_at(op, "values", v, -2), p.V = size_at(op, "values", v, -1);
    c.T = size_at(op, "indices", i, -2), c.k = size_at(op, "indices", i, -1);
    args.reserve(4);
    values = &args.add("values", v, Side::memory, {c.N, p.V});
    indices = &args.add("indices", i, Side::tokens, {c.T, c.k});
    weights = &args.add("weights", w, Side::tokens, {c.T, c.k});
    args.floats({values, weights});
    args.require(indices->scalar_type() == ScalarType::Long, "indices must be int64");
  }
  void fill(SparseRead& p) {
    p.choice.lead = args.lead();
    p.choice.indices = args.view(indices, 2);
    p.values = args.view(values, 2), p.weights = args.view(weights, 2);
    check_indices(args.op(), p.choice);
  }
};

Tensor forward(const Tensor& values, const Tensor& indices, const Tensor& weights) {
  SparseRead p;
  Inputs in("sparse_read", values, indices, weights, p);
  in.fill(p);
  Tensor read = empty(in.args.sizes(Side::tokens, {p.choice.T, p.V}), weights.scalar_type());
  p.read = in.args.view(read, 2);
  MK_CALL(sparse_read, p);
  return read;
}

std::tuple<Tensor, Tensor> backward(const Tensor& values, const Tensor& indices, const Tensor& weights,
                                    const std::optional<Tensor>& d_read, const std::vector<bool>& wants) {
  SparseReadBackward b;
  SparseRead& p = b.forward;
  Inputs in("sparse_read_backward", values, indices, weights, p);
  in.args.require(wants.size() == 2, "wants must have 2 entries");
  in.args.require(d_read.has_value(), "d_read must be given");
  const Tensor* dr = in.args.add("d_read", d_read, Side::tokens, {p.choice.T, p.V});
  in.args.floats({in.weights, dr});
  in.fill(p);
  b.d_read = in.args.view(dr, 2);
  const ChosenGradient d_values(in.args, in.values, wants[0], 2);
  const Gradient d_weights(in.args, in.weights, wants[1], Side::tokens, 2);
  b.d_values = d_values.out(), b.d_weights = d_weights.view();
  MK_CALL(sparse_read_backward, b);
  return {d_values.result(), d_weights.result()};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  m.impl("sparse_read", TORCH_BOX(&mk::forward));
  m.impl("sparse_read_backward", TORCH_BOX(&mk::backward));
}
