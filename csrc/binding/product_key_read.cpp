#include "params/product_key_read.h"

#include "binding/product_keys.h"

namespace mk {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

// Guards the inputs.
struct Inputs : ProductKeyInputs {
  int64_t V;
  const Tensor* values;

  Inputs(const char* op, const Tensor& q, const Tensor& s, const Tensor& v)
      : ProductKeyInputs(op, q, s), V(size_at(op, "values", v, -1)) {
    values = &args.add("values", for_both(op, "values", v), Side::memory, {n * n, V});
    args.floats({query, values});
  }
};

Three forward(const Tensor& query, const Tensor& subkeys, const Tensor& values, int64_t k, double scale) {
  Inputs in("product_key_read", query, subkeys, values);
  in.args.require(k >= 1, "k must be at least 1");
  Tensor read = in.result(in.V, query.scalar_type()), indices = in.result(k, ScalarType::Long);
  Tensor weights = in.result(k, stats_type(query.scalar_type()));
  const ProductKeySearch search = in.search(k, scale, {}, in.view_for_both(indices));
  const ProductKeyRead p{search, in.V, in.args.view(in.values, 2), in.view_for_both(read), in.view_for_both(weights)};
  MK_CALL(product_key_read, p);
  return {read, indices, weights};
}

Three backward(const Tensor& query, const Tensor& subkeys, const Tensor& values, const Tensor& indices,
               const Tensor& weights, const std::optional<Tensor>& d_read, const std::optional<Tensor>& d_weights,
               int64_t k, double scale, const std::vector<bool>& wants) {
  const char* op = "product_key_read_backward";
  Inputs in(op, query, subkeys, values);
  in.args.require(wants.size() == 3, "wants must have 3 entries");
  const Tensor* chosen = &in.args.add("indices", for_both(op, "indices", indices), Side::tokens, {in.T, k});
  const Tensor* w = &in.args.add("weights", for_both(op, "weights", weights), Side::tokens, {in.T, k});
  const Tensor* dr = in.args.add("d_read", for_both(op, "d_read", d_read), Side::tokens, {in.T, in.V});
  const Tensor* dw = in.args.add("d_weights", for_both(op, "d_weights", d_weights), Side::tokens, {in.T, k});
  in.args.floats({in.query, dr});
  in.args.stats({w, dw}, query);
  ProductKeyReadBackward p{
      in.backward(k, scale, chosen), in.V, in.args.view(in.values, 2), in.args.view(w, 2), in.args.view(dr, 2),
      in.args.view(dw, 2),           {}};
  const Gradient d_query(in.args, in.query, wants[0], Side::tokens, 2);
  const ChosenGradient d_subkeys(in.args, in.subkeys, wants[1], 2, *chosen),
      d_values(in.args, in.values, wants[2], 2, *chosen);
  p.search.halves.d_query = d_query.view(), p.search.halves.d_keys = d_subkeys.out(), p.d_values = d_values.out();
  MK_CALL(product_key_read_backward, p);
  return {whole(d_query.result()), d_subkeys.result(), for_one(d_values.result())};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "product_key_read", &mk::forward);
  MK_OPERATOR(m, "product_key_read_backward", &mk::backward);
}
