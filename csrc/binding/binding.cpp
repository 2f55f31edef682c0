#include "binding/binding.h"

#include <new>

namespace mk {

void call_operator(const char* op, Boxed function, StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  try {
    function(stack, inputs, outputs);
  } catch (const OutOfMemory& e) {
    if (e.bytes() == 0) fail(op, ": out of memory");
    fail(op, ": out of memory, could not allocate ", e.bytes(), " bytes");
  } catch (const std::bad_alloc&) {
    fail(op, ": out of memory");
  }
}

DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Bool: return DType::boolean;
    case ScalarType::Long: return DType::i64;
    case ScalarType::Char: return DType::i8;
    case ScalarType::Float8_e4m3fn: return DType::e4m3;
    case ScalarType::Byte: return DType::e8m0;  // its bits: the stable ABI knows no such tensor
    default: fail(op, ": ", name, " has a dtype that no kernel takes");
  }
}

int64_t size_at(const char* op, const char* name, const Tensor& t, int64_t d) {
  check(t.defined(), op, ": ", name, " must be given");
  const int64_t rank = t.dim();
  check(d < 0 ? -d <= rank : d < rank, op, ": ", name, " must have at least ", d < 0 ? -d : d + 1, " dimensions, got ",
        rank);
  const int64_t size = t.size(d < 0 ? rank + d : d);
  check(size <= kMaxSize, op, ": dimension ", d, " of ", name, " must be at most ", kMaxSize, ", got ", size);
  return size;
}

const Tensor& Arguments::add(const char* name, const Tensor& t, Side side, std::initializer_list<int64_t> tail) {
  check(t.defined(), op_, ": ", name, " must be given");
  // Read once: every access to a tensor is a call into torch, and repeated ones would be a tenth of the time of a small
  // op.
  const auto sizes = t.sizes();
  const int64_t rank = int64_t(sizes.size()), n = int64_t(tail.size());
  place_.enter(op_, name, t);
  check(rank >= n && rank - n <= kMaxLead, op_, ": ", name, " must have ", n, " to ", n + kMaxLead, " dimensions, got ",
        rank);
  int64_t d = rank - n;
  for (int64_t wanted : tail) {
    const int64_t size = sizes[size_t(d)];
    check(size == wanted, op_, ": dimension ", d, " of ", name, " must be ", wanted, ", got ", size);
    ++d;
  }
  check_storage(op_, name, t);
  const bool rows = n == 0 || sizes[size_t(rank - 1)] <= 1 || t.stride(rank - 1) == 1;
  check(!ready_, op_, ": ", name, " must be added before lead() is called");
  items_.push_back({name, rows ? t : as_rows(t), side, int(n), {}});
  Item& item = items_.back();
  item.sizes = item.tensor.sizes();
  return item.tensor;
}

const Tensor* Arguments::ranges(const std::optional<Tensor>& slot_range, int64_t T) {
  const Tensor* ranges = add("slot_range", slot_range, Side::tokens, {T, 2});
  require(ranges == nullptr || ranges->scalar_type() == ScalarType::Long, "slot_range must be int64");
  return ranges;
}

// Sizes and strides do not prove that the storage is large enough: untyped_storage().resize_() may have made it
// smaller.
void check_storage(const char* op, const char* name, const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t last = 0, end = 0, held = 0;
  bool overflows = false;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return;
    int64_t step = 0;
    overflows |= __builtin_mul_overflow(sizes[d] - 1, sizes[d] == 1 ? 0 : strides[d], &step);
    overflows |= __builtin_add_overflow(last, step, &last);
  }
  overflows |= __builtin_add_overflow(last, t.storage_offset(), &last);
  overflows |= last < 0 || __builtin_mul_overflow(last + 1, int64_t(t.element_size()), &end);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &held));
  check(!overflows && end <= held, op, ": ", name, " reaches beyond its storage of ", held, " bytes");
}

// Kernels compute numbers of batches, scratch sizes and products of two or three sizes in int64. Those must not
// overflow.
void Arguments::check_work() const {
  constexpr int64_t kMost = int64_t(1) << 61, kLeast = 16;  // a kernel may round any size up to a whole register
  auto product = [](std::initializer_list<int64_t> sizes) {
    int64_t all = 1;
    for (int64_t size : sizes) all = __builtin_mul_overflow(all, most(size, 1), &all) ? kMost + 1 : all;
    return all;
  };
  int64_t places = 1, rows[2] = {1, 1}, width = 1;  // tokens, slots
  for (int d = 0; d < lead_.rank; ++d) places = least(product({places, lead_.size[d]}), kMost);
  check(places <= kMaxSize, op_, ": the product of the leading dimensions must be at most ", kMaxSize);
  bool fits = true;
  for (const Item& item : items_) {
    int64_t own = places;
    for (int d = 0; d < item.tail; ++d) own = product({own, item.own(d)});
    fits = fits && own <= kMost;
    int64_t& n = rows[item.side == Side::memory];
    n = most(n, item.own(0));
  }
  // The last dimension of weights [T, N] is not a width.
  for (const Item& item : items_) {
    const int64_t last = item.own(item.tail - 1);
    if (item.tail > 1 && (item.side == Side::memory || last != rows[1])) width = most(width, last);
  }
  fits = fits && product({places, most(rows[0], kLeast), most(rows[1], kLeast), most(width, kLeast)}) <= kMost;
  check(fits, op_, ": the sizes of the arguments are too large, their product must be at most ", kMost);
}

void Arguments::floats(std::initializer_list<const Tensor*> tensors) const {
  int singles = 0, doubles = 0;
  for (const Tensor* t : tensors) {
    if (t == nullptr) continue;
    const DType d = dtype_of(op_, "a tensor", *t);
    check(d <= DType::f64, op_, ": float arguments must be float32, bfloat16, float16 or float64");
    ++(d == DType::f64 ? doubles : singles);
  }
  check(kDoubles || doubles == 0, op_, ": there is no kernel for float64");
  check(singles == 0 || doubles == 0, op_, ": float arguments must all be float64, or none");
}

void Arguments::slots(const Tensor& rows, const Tensor* scale, const Tensor& like) const {
  const bool compressed = is_compressed(dtype_of(op_, "a memory", rows));
  check(compressed == (scale != nullptr), op_, ": 8-bit slots must have a scale, others must not");
  if (compressed) stats({scale}, like);
  else floats({&rows, &like});
}

void Arguments::mask(const Tensor* mask, const Tensor& like) const {
  if (mask != nullptr && mask->scalar_type() != ScalarType::Bool) floats({mask, &like});
}

void Arguments::stats(std::initializer_list<const Tensor*> tensors, const Tensor& like) const {
  for (const Tensor* t : tensors) {
    check(t == nullptr || t->scalar_type() == stats_type(like.scalar_type()), op_,
          ": scales, lse, usage and retained must be float32, or float64 beside float64");
  }
}

const Lead& Arguments::lead() {
  if (ready_) return lead_;
  ready_ = true;
  int64_t whole[kMaxLead];
  for (int d = 0; d < kMaxLead; ++d) whole[d] = memory_[d] = 1;  // aligned at the last one
  for (const Item& item : items_) {
    const int rank = int(item.sizes.size()) - item.tail;
    lead_.rank = int(most(lead_.rank, rank));
    if (item.side == Side::memory) memory_rank_ = int(most(memory_rank_, rank));
    for (int d = 0; d < rank; ++d) {
      const int64_t size = item.sizes[size_t(d)];
      const int at = kMaxLead - rank + d;
      check(size == whole[at] || size == 1 || whole[at] == 1, op_, ": leading dimension ", d, " of ", item.name,
            " must be 1 or ", whole[at], ", got ", size);
      if (size != 1) whole[at] = size;
      if (item.side == Side::memory && size != 1) memory_[at] = size;
    }
  }
  for (int d = 0; d < lead_.rank; ++d) {
    const int at = kMaxLead - lead_.rank + d;
    lead_.size[d] = whole[at];
    lead_.shared[d] = memory_[at] == 1 && whole[at] != 1;
  }
  check_work();
  return lead_;
}

Sizes Arguments::sizes(Side side, std::initializer_list<int64_t> tail) {
  lead();
  Sizes out;
  if (side == Side::memory) {
    out.assign(memory_ + kMaxLead - memory_rank_, memory_ + kMaxLead);
  } else {
    out.assign(lead_.size, lead_.size + lead_.rank);
  }
  out.insert(out.end(), tail);
  return out;
}

View Arguments::view(const Tensor& t, int tail) const {
  View v;
  v.dtype = dtype_of(op_, "a tensor", t);
  const int64_t item = size_of(v.dtype);
  const auto strides = t.strides(), sizes = t.sizes();
  const int rank = int(sizes.size()), lead = rank - tail;
  v.data = static_cast<char*>(t.data_ptr());
  static char none[64];
  if (v.data == nullptr) v.data = none;  // the data pointer of an empty tensor may be null, but the argument was given
  // torch leaves the stride of a dimension of size 1 arbitrary. A single row gets the stride that several would have.
  if (tail > 0 && sizes[size_t(lead)] > 1) {
    v.row = strides[size_t(lead)] * item;
  } else if (tail > 0) {
    v.row = item;
    for (int d = lead + 1; d < rank; ++d) v.row *= sizes[size_t(d)];
  }
  for (int d = 0; d < lead; ++d) {
    v.lead[lead_.rank - lead + d] = sizes[size_t(d)] <= 1 ? 0 : strides[size_t(d)] * item;
  }
  return v;
}

Gradient::Gradient(Arguments& args, const Tensor* argument, bool wanted, Side side, int tail, bool own) : tail_(tail) {
  if (argument == nullptr || !wanted || argument->scalar_type() == ScalarType::Bool) return;
  dtype_ = argument->scalar_type();
  const auto sizes = argument->sizes();
  sizes_.assign(sizes.begin(), sizes.end());
  Sizes full = sizes_;
  if (side == Side::tokens || !kSumsInKernels) {
    full = args.sizes(side, {});
    full.insert(full.end(), sizes_.end() - tail, sizes_.end());
  }
  int64_t numbers = 1;
  for (int64_t size : full) numbers *= size;
  sum_ = empty(full, own && numbers == argument->numel() ? dtype_ : stats_type(dtype_));
  view_ = args.view(*sum_, tail);
}

void Gradient::zero() {
  if (sum_.has_value()) torch::stable::zero_(*sum_);
}

#ifdef MK_CUDA
// Sums `from` over the leading dimensions that `sizes` lacks or has with size 1.
static void sum_into(const Tensor& from, int, const Sizes& sizes, Tensor& to) {
  const int64_t extra = from.dim() - int64_t(sizes.size());
  Sizes over;
  for (int64_t d = 0; d < from.dim(); ++d) {
    if (d < extra || (sizes[size_t(d - extra)] == 1 && from.size(d) != 1)) over.push_back(d);
  }
  const torch::headeronly::IntHeaderOnlyArrayRef dims(over.data(), over.size());
  to = made(bytes_of(sizes, from.scalar_type()), [&] {
    return torch::stable::reshape(torch::stable::sum(from, dims, true),
                                  torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()));
  });
}
#else
namespace {

// to[j] = sum of from[i], in order of i, over the leading dimensions in which `to` has size 1. The last `tail`
// dimensions of both are equal. torch's sum may split the work by threads, so its bits would depend on their number.
template <class F>
void sum_places(const Tensor& from, int tail, Tensor& to) {
  const int lead = int(from.dim()) - tail, missing = int(from.dim() - to.dim());
  int64_t inner = 1;
  for (int d = lead; d < from.dim(); ++d) inner *= from.size(d);
  const F* x = static_cast<const F*>(from.data_ptr());
  F* y = static_cast<F*>(to.data_ptr());
  for (int64_t i = 0; i < to.numel(); ++i) y[i] = 0;
  const int64_t places = inner == 0 ? 0 : from.numel() / inner;
  for (int64_t place = 0; place < places; ++place, x += inner) {
    int64_t rest = place, at = 0, stride = inner;
    for (int d = lead - 1; d >= missing; --d) {
      const int64_t own = to.size(d - missing), i = rest % from.size(d);
      rest /= from.size(d);
      at += own == 1 ? 0 : i * stride;
      stride *= own;
    }
    for (int64_t i = 0; i < inner; ++i) y[at + i] += x[i];
  }
}

}  // namespace

static void sum_into(const Tensor& from, int tail, const Sizes& sizes, Tensor& to) {
  to = empty(sizes, from.scalar_type());
  if (to.scalar_type() == ScalarType::Double) sum_places<double>(from, tail, to);
  else sum_places<float>(from, tail, to);
}
#endif

Tensor Gradient::result() const {
  if (!sum_.has_value()) return nothing();
  Tensor out = *sum_;
  int64_t own = 1;
  for (int64_t s : sizes_) own *= s;
  if (out.numel() != own) {
    sum_into(*sum_, tail_, sizes_, out);
  } else if (out.dim() != int64_t(sizes_.size())) {
    out = torch::stable::reshape(out, torch::headeronly::IntHeaderOnlyArrayRef(sizes_.data(), sizes_.size()));
  }
  if (out.scalar_type() == dtype_) return out;
  return made(bytes_of(sizes_, dtype_), [&] { return torch::stable::to(out, dtype_); });
}

}  // namespace mk
