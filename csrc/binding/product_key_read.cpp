#include "params/product_key_read.h"

#include "binding/product_keys.h"

namespace mk {
namespace {

using Optional = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Checks the inputs.
struct Inputs : ProductKeyInputs {
  int64_t V;
  const Tensor *values, *value_scale;

  Inputs(const char* op, const Tensor& q, const Tensor& s, const Tensor& v, const Optional& scale)
      : ProductKeyInputs(op, q, s), V(size_at(op, "values", v, -1)) {
    values = &args.add("values", for_both(op, "values", v), Side::memory, {n * n, V});
    value_scale = args.add("value_scale", for_both(op, "value_scale", scale, 1), Side::memory, {n * n});
    args.slots(*values, value_scale, *query);
  }
};

Four run(const Tensor& query, const Tensor& subkeys, const Tensor& values, const Optional& value_scale, int64_t k,
         double scale) {
  Inputs in("product_key_read", query, subkeys, values, value_scale);
  in.args.require(k >= 1, "k must be at least 1");
  const ScalarType stats = stats_type(query.scalar_type());
  Tensor read = in.result({in.V}, query.scalar_type()), indices = in.result({k}, ScalarType::Long);
  Tensor weights = in.result({k}, stats), lse = in.result({}, stats);
  ProductKeyRead p;
  p.search = in.search(k, scale, {}, in.view_for_both(indices));
  p.V = in.V, p.values = in.args.slot_view(in.values, in.value_scale);
  p.read = in.view_for_both(read), p.weights = in.view_for_both(weights), p.lse = in.view_for_both(lse, 1);
  MK_CALL(product_key_read, p);
  return {read, indices, weights, lse};
}

Three run_backward(const Tensor& query, const Tensor& subkeys, const Tensor& values, const Optional& value_scale,
                   const Tensor& indices, const Tensor& weights, const Optional& d_read, const Optional& d_weights,
                   const Optional& d_lse, int64_t k, double scale, const std::vector<bool>& wants) {
  const char* op = "product_key_read_backward";
  Inputs in(op, query, subkeys, values, value_scale);
  in.args.require(wants.size() == 3, "wants must have 3 entries");
  const Tensor* chosen = &in.args.add("indices", for_both(op, "indices", indices), Side::tokens, {in.T, k});
  const Tensor* w = &in.args.add("weights", for_both(op, "weights", weights), Side::tokens, {in.T, k});
  const Tensor* dr = in.args.add("d_read", for_both(op, "d_read", d_read), Side::tokens, {in.T, in.V});
  const Tensor* dw = in.args.add("d_weights", for_both(op, "d_weights", d_weights), Side::tokens, {in.T, k});
  const Tensor* dl = in.args.add("d_lse", for_both(op, "d_lse", d_lse, 1), Side::tokens, {in.T});
  in.args.floats({in.query, dr});
  in.args.stats({w, dw, dl}, query);
  ProductKeyReadBackward p;
  p.search = in.backward(k, scale, chosen);
  p.V = in.V, p.values = in.args.slot_view(in.values, in.value_scale), p.weights = in.args.view(w, 2);
  p.d_read = in.args.view(dr, 2), p.d_weights = in.args.view(dw, 2), p.d_lse = in.args.view(dl, 1);
  const Gradient d_query(in.args, in.query, wants[0], Side::tokens, 2);
  const ChosenGradient d_subkeys(in.args, in.subkeys, wants[1], 2, *chosen),
      d_values(in.args, in.values, wants[2], 2, *chosen);
  p.search.halves.d_query = d_query.view(), p.search.halves.d_keys = d_subkeys.out(), p.d_values = d_values.out();
  MK_CALL(product_key_read_backward, p);
  return {whole(d_query.result()), d_subkeys.result(), for_one(d_values.result())};
}

Four forward(const Tensor& query, const Tensor& subkeys, const Tensor& values, int64_t k, double scale) {
  return run(query, subkeys, values, std::nullopt, k, scale);
}

Three backward(const Tensor& query, const Tensor& subkeys, const Tensor& values, const Tensor& indices,
               const Tensor& weights, const Optional& d_read, const Optional& d_weights, const Optional& d_lse,
               int64_t k, double scale, const std::vector<bool>& wants) {
  return run_backward(query, subkeys, values, std::nullopt, indices, weights, d_read, d_weights, d_lse, k, scale,
                      wants);
}

// Compressed values have no gradient.
Two backward_compressed(const Tensor& query, const Tensor& subkeys, const Tensor& values, const Optional& value_scale,
                        const Tensor& indices, const Tensor& weights, const Optional& d_read, const Optional& d_weights,
                        const Optional& d_lse, int64_t k, double scale, const std::vector<bool>& wants) {
  check(wants.size() == 2, "product_key_read_compressed_backward: wants must have 2 entries");
  const Three d = run_backward(query, subkeys, values, value_scale, indices, weights, d_read, d_weights, d_lse, k,
                               scale, {wants[0], wants[1], false});
  return {std::get<0>(d), std::get<1>(d)};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "product_key_read", &mk::forward);
  MK_OPERATOR(m, "product_key_read_backward", &mk::backward);
  MK_OPERATOR(m, "product_key_read_compressed", &mk::run);
  MK_OPERATOR(m, "product_key_read_compressed_backward", &mk::backward_compressed);
}
