#include "cpu/product_key_search.h"

#include "chosen.h"

namespace mk {
namespace {

Tensor reshaped(const Tensor& t, const Sizes& sizes) {
  return torch::stable::reshape(t, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()));
}

// [..., T, 2h] -> [..., 2, T, h]: the half becomes the last leading dimension.
Tensor in_halves(const char* op, const Tensor& query, int64_t h) {
  check(size_at(op, "query", query, -2) >= 0 && query.size(query.dim() - 1) == 2 * h, op, ": query must have ", 2 * h,
        " columns");
  Sizes sizes(query.sizes().begin(), query.sizes().end());
  sizes.back() = 2;
  sizes.push_back(h);
  return torch::stable::transpose(reshaped(query, sizes), -3, -2);
}

// And back.
Tensor whole(const Tensor& halves) {
  if (halves.dim() < 3) return halves;  // not wanted
  const Tensor rows = torch::stable::transpose(halves, -3, -2);
  Sizes sizes(rows.sizes().begin(), rows.sizes().end() - 1);
  sizes.back() *= rows.size(rows.dim() - 1);
  return reshaped(rows, sizes);
}

// [..., T, k] -> [..., 1, T, k]: the same for both halves.
Tensor for_both(const char* op, const char* name, const Tensor& t) {
  size_at(op, name, t, -2);
  return torch::stable::unsqueeze(t, -3);
}

// Guards the inputs. Query and subkeys have one leading dimension more, the half.
struct Inputs {
  Arguments args;
  int64_t T, n, h;
  const Tensor *query, *subkeys;

  Inputs(const char* op, const Tensor& q, const Tensor& s)
      : args(op), T(size_at(op, "query", q, -2)), n(size_at(op, "subkeys", s, -2)), h(size_at(op, "subkeys", s, -1)) {
    args.require(size_at(op, "subkeys", s, -3) == 2, "subkeys must hold 2 lists");
    args.require(n < int64_t(1) << 31, "subkeys must hold fewer than 2^31 keys");
    query = &args.add("query", in_halves(op, q, h), Side::tokens, {T, h});
    subkeys = &args.add("subkeys", s, Side::memory, {n, h});
    args.floats({query, subkeys});
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& subkeys, int64_t k, double scale) {
  Inputs in("product_key_search", query, subkeys);
  in.args.require(k >= 1, "k must be at least 1");
  ProductKeySearch p;
  TopkSearch& s = p.halves;
  s.lead = in.args.lead();
  s.T = in.T, s.N = in.n, s.K = in.h, s.k = least(k, in.n), s.scale = scale;
  s.query = in.args.view(in.query, 2), s.keys = in.args.view(in.subkeys, 2);
  p.k = k;
  Sizes sizes = in.args.sizes(Side::tokens, {});
  sizes.back() = in.T;  // instead of the half
  sizes.push_back(k);
  Tensor scores = empty(sizes, query.scalar_type()), indices = empty(sizes, ScalarType::Long);
  p.scores = in.args.view(torch::stable::unsqueeze(scores, -3), 2);
  p.indices = in.args.view(torch::stable::unsqueeze(indices, -3), 2);
  MK_CALL(product_key_search, p);
  return {scores, indices};
}

std::tuple<Tensor, Tensor> backward(const Tensor& query, const Tensor& subkeys, const Tensor& indices,
                                    const std::optional<Tensor>& d_scores, int64_t k, double scale,
                                    const std::vector<bool>& wants) {
  const char* op = "product_key_search_backward";
  Inputs in(op, query, subkeys);
  in.args.require(wants.size() == 2, "wants must have 2 entries");
  in.args.require(d_scores.has_value(), "d_scores must be given");
  const Tensor* chosen = &in.args.add("indices", for_both(op, "indices", indices), Side::tokens, {in.T, k});
  const Tensor* ds = &in.args.add("d_scores", for_both(op, "d_scores", *d_scores), Side::tokens, {in.T, k});
  in.args.require(chosen->scalar_type() == ScalarType::Long, "indices must be int64");
  in.args.floats({in.query, ds});
  ProductKeySearchBackward p;
  TopkSearchBackward& b = p.halves;
  b.choice = {in.args.lead(), in.T, k, in.n * in.n, in.args.view(chosen, 2)};
  check_indices(op, b.choice);
  b.choice.N = in.n;
  b.K = in.h, b.scale = scale;
  b.query = in.args.view(in.query, 2), b.keys = in.args.view(in.subkeys, 2), b.d_scores = in.args.view(ds, 2);
  const Gradient d_query(in.args, in.query, wants[0], Side::tokens, 2);
  const ChosenGradient d_subkeys(in.args, in.subkeys, wants[1], 2);
  b.d_query = d_query.view(), b.d_keys = d_subkeys.out();
  MK_CALL(product_key_search_backward, p);
  return {whole(d_query.result()), d_subkeys.result()};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  m.impl("product_key_search", TORCH_BOX(&mk::forward));
  m.impl("product_key_search_backward", TORCH_BOX(&mk::backward));
}
