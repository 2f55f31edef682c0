#include "params/gather_rows.h"

#include "binding/chosen_slots.h"

namespace mk {
namespace {

bool is_float(DType d) { return d <= DType::f64; }

// Checks everything but the result and fills in `p`. The tensors are kept here while the call runs.
struct Inputs {
  Arguments args;
  const Tensor *values, *indices, *scale;

  Inputs(const char* op, const Tensor& v, const Tensor& i, const std::optional<Tensor>& s, int64_t block, GatherRows& p)
      : args(op) {
    p.N = size_at(op, "values", v, 0), p.V = size_at(op, "values", v, 1);
    values = &args.add("values", v, Side::memory, {p.N, p.V});
    indices = &args.add("indices", i, Side::tokens, {size_at(op, "indices", i, -1)});
    check(block >= 1 && block <= kMaxSize, op, ": block must be in [1, 2^40], got ", block);
    scale = args.add("value_scale", s, Side::memory, {p.N, div_up(p.V, block)});
    args.require(v.dim() == 2 && (scale == nullptr || scale->dim() == 2),
                 "values and value_scale must have 2 dimensions");
    args.require(indices->scalar_type() == ScalarType::Long, "indices must be int64");
    p.dtype = dtype_of(op, "values", v), p.block = block;
    args.require(is_float(p.dtype) || is_compressed(p.dtype), "values must be floats, int8 or float8_e4m3fn");
    args.require(is_compressed(p.dtype) == (scale != nullptr), "8-bit values must have a scale, others must not");
  }
  void fill(GatherRows& p) {
    args.lead();
    const View rows = args.view(values, 2), factors = args.view(scale, 2);
    p.values = rows.data, p.row = rows.row;
    p.scale = factors.data, p.scale_row = factors.row, p.scale_dtype = factors.dtype;
    args.require(!factors || factors.dtype == DType::f32 || factors.dtype == DType::e8m0,
                 "value_scale must be float32, or float8_e8m0fnu as uint8");
    all_ = contiguous(*indices);
    p.indices = static_cast<const int64_t*>(all_->data_ptr()), p.count = all_->numel();
  }
  void run(GatherRows& p, const Tensor& out) {
    p.out = static_cast<char*>(out.mutable_data_ptr()), p.out_dtype = dtype_of(args.op(), "the result", out);
    args.require(is_float(p.out_dtype), "dtype must be a float");
    args.require(is_compressed(p.dtype) || (p.dtype == DType::f64) == (p.out_dtype == DType::f64),
                 "dtype must be float64 beside float64 values, and only there");
    const int64_t wrong = MK_CALL(gather_rows, p);
    check(wrong == -1, args.op(), ": indices must be in [-1, ", p.N, "), got ", wrong);
  }
  static Tensor contiguous(const Tensor& t) {
    return t.is_contiguous() ? t : made(bytes_of(t), [&] { return torch::stable::contiguous(t); });
  }

 private:
  std::optional<Tensor> all_;
};

Tensor forward(const Tensor& values, const Tensor& indices, const std::optional<Tensor>& value_scale, int64_t block,
               ScalarType dtype) {
  GatherRows p;
  Inputs in("gather_rows", values, indices, value_scale, block, p);
  in.fill(p);
  Sizes sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.push_back(p.V);
  const Tensor rows = empty(sizes, dtype);
  in.run(p, rows);
  return rows;
}

// The same into memory of the caller's: nothing is allocated where the indices are contiguous.
void into(const Tensor& values, const Tensor& indices, const std::optional<Tensor>& value_scale, int64_t block,
          const Tensor& out) {
  GatherRows p;
  Inputs in("gather_rows_out", values, indices, value_scale, block, p);
  in.fill(p);
  check_storage("gather_rows_out", "out", out);
  int64_t needed = 0;
  in.args.require(
      out.is_cpu() && out.is_contiguous() && !__builtin_mul_overflow(p.count, p.V, &needed) && out.numel() == needed,
      "out must be contiguous, with a row for every index");
  in.run(p, out);
}

Tensor backward(const Tensor& values, const Tensor& indices, const std::optional<Tensor>& value_scale,
                const std::optional<Tensor>& d_rows, int64_t block, ScalarType, const std::vector<bool>& wants) {
  GatherRows p;
  GatherRowsBackward b;
  Inputs in("gather_rows_backward", values, indices, value_scale, block, p);
  in.args.require(wants.size() == 1 && d_rows.has_value(), "wants must have 1 entry, and d_rows must be given");
  in.args.require(is_float(p.dtype), "only floats have a gradient");
  Choice& c = b.choice;
  c.T = size_at(in.args.op(), "indices", indices, -1), c.k = 1, c.N = p.N, b.V = p.V;
  const Tensor& d = in.args.add("d_rows", *d_rows, Side::tokens, {c.T, p.V});
  in.args.floats({in.values, &d});
  c.lead = in.args.lead(), c.indices = in.args.view(in.indices, 1), b.d_rows = in.args.view(d, 2);
  check_indices(in.args.op(), c);
  const ChosenGradient d_values(in.args, in.values, wants[0], 2, *in.indices);
  b.d_values = d_values.out();
  if (wants[0]) MK_CALL(gather_rows_backward, b);
  return d_values.result();
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "gather_rows", &mk::forward);
  MK_OPERATOR(m, "gather_rows_backward", &mk::backward);
  MK_OPERATOR(m, "gather_rows_out", &mk::into);
}
