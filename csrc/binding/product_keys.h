// Shared by the bindings of product_key_search and product_key_read: the half of a key as a leading dimension.
#pragma once

#include "binding/chosen_slots.h"
#include "params/product_key_search.h"

namespace mk {

// [..., T, 2h] -> [..., 2, T, h]: the half becomes the last leading dimension.
Tensor in_halves(const char* op, const Tensor& query, int64_t h);
// The inverse.
Tensor whole(const Tensor& halves);

// [..., T, k] -> [..., 1, T, k], or with `tail` 1 [..., T] -> [..., 1, T]: both halves share it.
Tensor for_both(const char* op, const char* name, const Tensor& t, int tail = 2);
std::optional<Tensor> for_both(const char* op, const char* name, const std::optional<Tensor>& t, int tail = 2);
// The inverse.
Tensor for_one(const Tensor& t);

// Checks the inputs. Query and subkeys get one more leading dimension, the half.
struct ProductKeyInputs {
  Arguments args;
  int64_t T, n, h;
  const Tensor *query, *subkeys;

  ProductKeyInputs(const char* op, const Tensor& q, const Tensor& s);

  // Call it after the last argument is added. Makes a result [..., T, tail], which both halves share, and its view.
  Tensor result(std::initializer_list<int64_t> tail, ScalarType dtype);
  View view_for_both(const Tensor& result, int tail = 2) {
    return args.view(for_both(args.op(), "a result", result, tail), tail);
  }
  ProductKeySearch search(int64_t k, double scale, const View& scores, const View& indices);
  // Everything but d_scores, for indices [..., 1, T, k], which it checks.
  ProductKeySearchBackward backward(int64_t k, double scale, const Tensor* indices);
};

}  // namespace mk
