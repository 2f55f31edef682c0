#include "params/sparse_read.h"

#include "binding/chosen_slots.h"

namespace mk {
namespace {

using Two = std::tuple<Tensor, Tensor>;

// Checks the inputs and fills in `p`, except for the result.
struct Inputs {
  Arguments args;
  const Tensor *values, *indices, *weights, *value_scale;

  Inputs(const char* op, const Tensor& v, const Tensor& i, const Tensor& w, const std::optional<Tensor>& scale,
         SparseRead& p)
      : args(op) {
    Choice& c = p.choice;
    c.N = size_at(op, "values", v, -2), p.V = size_at(op, "values", v, -1);
    c.T = size_at(op, "indices", i, -2), c.k = size_at(op, "indices", i, -1);
    values = &args.add("values", v, Side::memory, {c.N, p.V});
    indices = &args.add("indices", i, Side::tokens, {c.T, c.k});
    weights = &args.add("weights", w, Side::tokens, {c.T, c.k});
    value_scale = args.add("value_scale", scale, Side::memory, {c.N});
    args.floats({weights});
    args.slots(*values, value_scale, *weights);
    args.require(indices->scalar_type() == ScalarType::Long, "indices must be int64");
  }
  void fill(SparseRead& p) {
    p.choice.lead = args.lead();
    p.choice.indices = args.view(indices, 2);
    p.values = args.slot_view(values, value_scale), p.weights = args.view(weights, 2);
  }
};

Tensor run(const Tensor& values, const Tensor& indices, const Tensor& weights,
           const std::optional<Tensor>& value_scale) {
  SparseRead p;
  Inputs in("sparse_read", values, indices, weights, value_scale, p);
  in.fill(p);
  Tensor read = empty(in.args.sizes(Side::tokens, {p.choice.T, p.V}), weights.scalar_type());
  p.read = in.args.view(read, 2);
  check_index(in.args.op(), p.choice, MK_CALL(sparse_read, p));
  return read;
}

Two run_backward(const Tensor& values, const Tensor& indices, const Tensor& weights,
                 const std::optional<Tensor>& value_scale, const std::optional<Tensor>& d_read, bool wants_values,
                 bool wants_weights) {
  SparseReadBackward b;
  SparseRead& p = b.forward;
  Inputs in("sparse_read_backward", values, indices, weights, value_scale, p);
  in.args.require(d_read.has_value(), "d_read must be given");
  const Tensor* dr = in.args.add("d_read", d_read, Side::tokens, {p.choice.T, p.V});
  in.args.floats({in.weights, dr});
  in.fill(p);
  check_indices(in.args.op(), p.choice);
  b.d_read = in.args.view(dr, 2);
  const ChosenGradient d_values(in.args, in.values, wants_values, 2, *in.indices);
  const Gradient d_weights(in.args, in.weights, wants_weights, Side::tokens, 2);
  b.d_values = d_values.out(), b.d_weights = d_weights.view();
  MK_CALL(sparse_read_backward, b);
  return {d_values.result(), d_weights.result()};
}

Tensor forward(const Tensor& values, const Tensor& indices, const Tensor& weights) {
  return run(values, indices, weights, std::nullopt);
}

Two backward(const Tensor& values, const Tensor& indices, const Tensor& weights, const std::optional<Tensor>& d_read,
             const std::vector<bool>& wants) {
  check(wants.size() == 2, "sparse_read_backward: wants must have 2 entries");
  return run_backward(values, indices, weights, std::nullopt, d_read, wants[0], wants[1]);
}

// Compressed values have no gradient.
Tensor backward_compressed(const Tensor& values, const Tensor& indices, const Tensor& weights,
                           const std::optional<Tensor>& value_scale, const std::optional<Tensor>& d_read,
                           const std::vector<bool>& wants) {
  check(wants.size() == 1, "sparse_read_compressed_backward: wants must have 1 entry");
  return std::get<1>(run_backward(values, indices, weights, value_scale, d_read, false, wants[0]));
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "sparse_read", &mk::forward);
  MK_OPERATOR(m, "sparse_read_backward", &mk::backward);
  if (mk::kCompressedSlots) {
    MK_OPERATOR(m, "sparse_read_compressed", &mk::run);
    MK_OPERATOR(m, "sparse_read_compressed_backward", &mk::backward_compressed);
  }
}
