// What the bindings of product_key_search and product_key_read share: the half as a leading dimension.
#pragma once

#include "binding/chosen_slots.h"
#include "params/product_key_search.h"

namespace mk {

// [..., T, 2h] -> [..., 2, T, h]: the half becomes the last leading dimension.
Tensor in_halves(const char* op, const Tensor& query, int64_t h);
// And back.
Tensor whole(const Tensor& halves);

// [..., T, k] -> [..., 1, T, k]: the same for both halves.
Tensor for_both(const char* op, const char* name, const Tensor& t);
std::optional<Tensor> for_both(const char* op, const char* name, const std::optional<Tensor>& t);
// And back.
Tensor for_one(const Tensor& t);

// Guards the inputs. Query and subkeys have one leading dimension more, the half.
struct ProductKeyInputs {
  Arguments args;
  int64_t T, n, h;
  const Tensor *query, *subkeys;

  ProductKeyInputs(const char* op, const Tensor& q, const Tensor& s);

  // After the last argument. A result [..., T, width] for every pair, and its view.
  Tensor result(int64_t width, ScalarType dtype);
  View view_for_both(const Tensor& result) { return args.view(for_both(args.op(), "a result", result), 2); }
  ProductKeySearch search(int64_t k, double scale, const View& scores, const View& indices);
  // Of a choice [..., 1, T, k], which is checked. Without d_scores.
  ProductKeySearchBackward backward(int64_t k, double scale, const Tensor* indices);
};

}  // namespace mk
