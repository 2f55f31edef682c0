#include "binding/product_keys.h"

namespace mk {
namespace {

Tensor reshaped(const Tensor& t, const Sizes& sizes) {
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes.data(), sizes.size());
  return made(bytes_of(t), [&] { return torch::stable::reshape(t, shape); });
}

}  // namespace

Tensor in_halves(const char* op, const Tensor& query, int64_t h) {
  check(size_at(op, "query", query, -2) >= 0 && query.size(query.dim() - 1) == 2 * h, op, ": query must have ", 2 * h,
        " columns");
  check_storage(op, "query", query);
  Sizes sizes(query.sizes().begin(), query.sizes().end());
  sizes.back() = 2;
  sizes.push_back(h);
  return torch::stable::transpose(reshaped(query, sizes), -3, -2);
}

Tensor whole(const Tensor& halves) {
  if (halves.dim() < 3) return halves;  // an unwanted gradient is empty
  const Tensor rows = torch::stable::transpose(halves, -3, -2);
  Sizes sizes(rows.sizes().begin(), rows.sizes().end() - 1);
  sizes.back() *= rows.size(rows.dim() - 1);
  return reshaped(rows, sizes);
}

Tensor for_both(const char* op, const char* name, const Tensor& t, int tail) {
  size_at(op, name, t, -tail);
  check_storage(op, name, t);
  return torch::stable::unsqueeze(t, -tail - 1);
}

std::optional<Tensor> for_both(const char* op, const char* name, const std::optional<Tensor>& t, int tail) {
  return t.has_value() ? std::optional<Tensor>(for_both(op, name, *t, tail)) : std::nullopt;
}

Tensor for_one(const Tensor& t) {
  if (t.dim() < 3) return t;  // an unwanted gradient is empty
  Sizes sizes(t.sizes().begin(), t.sizes().end());
  sizes.erase(sizes.end() - 3);
  return reshaped(t, sizes);
}

ProductKeyInputs::ProductKeyInputs(const char* op, const Tensor& q, const Tensor& s)
    : args(op), T(size_at(op, "query", q, -2)), n(size_at(op, "subkeys", s, -2)), h(size_at(op, "subkeys", s, -1)) {
  args.require(size_at(op, "subkeys", s, -3) == 2, "subkeys must hold 2 lists");
  args.require(n < int64_t(1) << 31, "subkeys must hold fewer than 2^31 keys");
  query = &args.add("query", in_halves(op, q, h), Side::tokens, {T, h});
  subkeys = &args.add("subkeys", s, Side::memory, {n, h});
  args.floats({query, subkeys});
}

Tensor ProductKeyInputs::result(std::initializer_list<int64_t> tail, ScalarType dtype) {
  Sizes sizes = args.sizes(Side::tokens, {});
  sizes.back() = T;  // replaces the dimension of the half
  for (int64_t size : tail) sizes.push_back(size);
  return empty(sizes, dtype);
}

ProductKeySearch ProductKeyInputs::search(int64_t k, double scale, const View& scores, const View& indices) {
  ProductKeySearch p;
  TopkSearch& s = p.halves;
  s.lead = args.lead();
  s.T = T, s.N = n, s.K = h, s.k = least(k, n), s.scale = scale;
  s.query = args.view(query, 2), s.keys = args.view(subkeys, 2);
  p.k = k, p.scores = scores, p.indices = indices;
  return p;
}

ProductKeySearchBackward ProductKeyInputs::backward(int64_t k, double scale, const Tensor* indices) {
  args.require(indices->scalar_type() == ScalarType::Long, "indices must be int64");
  ProductKeySearchBackward p;
  TopkSearchBackward& b = p.halves;
  b.choice = {args.lead(), T, k, n * n, args.view(indices, 2)};
  check_indices(args.op(), b.choice);
  b.choice.N = n;
  b.K = h, b.scale = scale;
  b.query = args.view(query, 2), b.keys = args.view(subkeys, 2);
  return p;
}

}  // namespace mk
