#include "params/sparse_adam.h"

#include <cmath>

#include "binding/binding.h"

namespace mk {
namespace {

constexpr const char* kOp = "sparse_adam";

char* rows(const char* name, const Tensor& t, int64_t n, int64_t width, ScalarType dtype) {
  check(t.dim() == 2 && t.size(0) == n && t.size(1) == width && t.scalar_type() == dtype && t.is_contiguous(), kOp,
        ": ", name, " must be contiguous, [", n, ", ", width, "], and of its dtype");
  check(t.is_cpu(), kOp, ": ", name, " must be on the CPU");
  check_storage(kOp, name, t);
  return static_cast<char*>(t.mutable_data_ptr());
}

void run(const Tensor& values, const Tensor& first, const Tensor& second, const Tensor& slots, const Tensor& gradient,
         double step_size, double beta1, double beta2, double eps) {
  SparseAdam p;
  const int64_t n = size_at(kOp, "values", values, 0);
  p.V = size_at(kOp, "values", values, 1), p.count = size_at(kOp, "slots", slots, 0);
  const ScalarType dtype = values.scalar_type(), exact = stats_type(dtype);
  p.dtype = dtype_of(kOp, "values", values);
  check(p.dtype <= DType::f64, kOp, ": values must be floats");
  p.values = rows("values", values, n, p.V, dtype);
  p.first = rows("first", first, n, p.V, exact), p.second = rows("second", second, n, p.V, exact);
  p.gradient = rows("gradient", gradient, p.count, p.V, dtype);
  check(slots.dim() == 1 && slots.scalar_type() == ScalarType::Long && slots.is_contiguous() && slots.is_cpu(), kOp,
        ": slots must be contiguous int64 of one dimension");
  check_storage(kOp, "slots", slots);
  p.slots = static_cast<const int64_t*>(slots.data_ptr());
  // Ascending, so that no row is named twice: two threads would write to it.
  for (int64_t j = 0; j < p.count; ++j) {
    check(p.slots[j] >= 0 && p.slots[j] < n, kOp, ": slots must be in [0, ", n, "), got ", p.slots[j]);
    check(j == 0 || p.slots[j] > p.slots[j - 1], kOp, ": slots must ascend, got ", p.slots[j], " behind ",
          j == 0 ? 0 : p.slots[j - 1]);
  }
  p.step_size = step_size, p.beta1 = beta1, p.beta2 = beta2, p.eps = eps;
  MK_CALL(sparse_adam, p);
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) { MK_OPERATOR(m, "sparse_adam", &mk::run); }
