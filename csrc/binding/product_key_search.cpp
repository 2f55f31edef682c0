#include "params/product_key_search.h"

#include "binding/product_keys.h"

namespace mk {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& subkeys, int64_t k, double scale) {
  ProductKeyInputs in("product_key_search", query, subkeys);
  in.args.require(k >= 1, "k must be at least 1");
  Tensor scores = in.result({k}, query.scalar_type()), indices = in.result({k}, ScalarType::Long);
  const ProductKeySearch p = in.search(k, scale, in.view_for_both(scores), in.view_for_both(indices));
  MK_CALL(product_key_search, p);
  return {scores, indices};
}

std::tuple<Tensor, Tensor> backward(const Tensor& query, const Tensor& subkeys, const Tensor& indices,
                                    const std::optional<Tensor>& d_scores, int64_t k, double scale,
                                    const std::vector<bool>& wants) {
  const char* op = "product_key_search_backward";
  ProductKeyInputs in(op, query, subkeys);
  in.args.require(wants.size() == 2, "wants must have 2 entries");
  in.args.require(d_scores.has_value(), "d_scores must be given");
  const Tensor* chosen = &in.args.add("indices", for_both(op, "indices", indices), Side::tokens, {in.T, k});
  const Tensor* ds = &in.args.add("d_scores", for_both(op, "d_scores", *d_scores), Side::tokens, {in.T, k});
  in.args.floats({in.query, ds});
  ProductKeySearchBackward p = in.backward(k, scale, chosen);
  const Gradient d_query(in.args, in.query, wants[0], Side::tokens, 2);
  const ChosenGradient d_subkeys(in.args, in.subkeys, wants[1], 2, *chosen);
  p.halves.d_scores = in.args.view(ds, 2), p.halves.d_query = d_query.view(), p.halves.d_keys = d_subkeys.out();
  MK_CALL(product_key_search_backward, p);
  return {whole(d_query.result()), d_subkeys.result()};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "product_key_search", &mk::forward);
  MK_OPERATOR(m, "product_key_search_backward", &mk::backward);
}
