#include "binding.h"

namespace mk {

DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Bool: return DType::boolean;
    case ScalarType::Long: return DType::i64;
    default: STD_TORCH_CHECK(false, op, ": ", name, " has a dtype without a kernel"); return DType::f32;
  }
}

int64_t size_at(const char* op, const char* name, const Tensor& t, int64_t d) {
  const int64_t rank = t.dim();
  STD_TORCH_CHECK(d < 0 ? -d <= rank : d < rank, op, ": ", name, " has too few dimensions, ", rank);
  return t.size(d < 0 ? rank + d : d);
}

const Tensor& Arguments::add(const char* name, const Tensor& t, Side side, std::initializer_list<int64_t> tail) {
  const int64_t rank = t.dim(), n = int64_t(tail.size());
  place_.enter(op_, name, t);
  STD_TORCH_CHECK(rank >= n && rank - n <= kMaxLead, op_, ": ", name, " has ", rank, " dimensions");
  int64_t d = rank - n;
  for (int64_t wanted : tail) {
    STD_TORCH_CHECK(t.size(d) == wanted, op_, ": dimension ", d, " of ", name, " must be ", wanted, ", got ",
                    t.size(d));
    ++d;
  }
  const bool rows = n == 0 || t.size(rank - 1) <= 1 || t.stride(rank - 1) == 1;
  STD_TORCH_CHECK(!ready_, op_, ": ", name, " came after the leading dimensions were settled");
  items_.push_back({name, rows ? t : torch::stable::contiguous(t), side, int(n)});
  return items_.back().tensor;
}

void Arguments::floats(std::initializer_list<const Tensor*> tensors) const {
  int singles = 0, doubles = 0;
  for (const Tensor* t : tensors) {
    if (t == nullptr) continue;
    const DType d = dtype_of(op_, "a tensor", *t);
    STD_TORCH_CHECK(d <= DType::f64, op_, ": an argument that must be a float tensor is not");
    ++(d == DType::f64 ? doubles : singles);
  }
  STD_TORCH_CHECK(kDoubles || doubles == 0, op_, ": there is no kernel for float64");
  STD_TORCH_CHECK(singles == 0 || doubles == 0, op_, ": float64 does not mix with other dtypes");
}

void Arguments::mask(const Tensor* mask, const Tensor& like) const {
  if (mask != nullptr && mask->scalar_type() != ScalarType::Bool) floats({mask, &like});
}

void Arguments::stats(std::initializer_list<const Tensor*> tensors, const Tensor& like) const {
  for (const Tensor* t : tensors) {
    STD_TORCH_CHECK(t == nullptr || t->scalar_type() == stats_type(like.scalar_type()), op_,
                    ": lse, usage and retained must be float32, or float64 beside float64");
  }
}

const Lead& Arguments::lead() {
  if (ready_) return lead_;
  ready_ = true;
  int64_t whole[kMaxLead];
  for (int d = 0; d < kMaxLead; ++d) whole[d] = memory_[d] = 1;  // aligned at the end
  for (const Item& item : items_) {
    const int rank = int(item.tensor.dim()) - item.tail;
    lead_.rank = int(most(lead_.rank, rank));
    if (item.side == Side::memory) memory_rank_ = int(most(memory_rank_, rank));
    for (int d = 0; d < rank; ++d) {
      const int64_t size = item.tensor.size(d);
      const int at = kMaxLead - rank + d;
      STD_TORCH_CHECK(size == whole[at] || size == 1 || whole[at] == 1, op_, ": leading dimension ", d, " of ",
                      item.name, " is ", size, " and does not broadcast to ", whole[at]);
      if (size != 1) whole[at] = size;
      if (item.side == Side::memory && size != 1) memory_[at] = size;
    }
  }
  for (int d = 0; d < lead_.rank; ++d) {
    const int at = kMaxLead - lead_.rank + d;
    lead_.size[d] = whole[at];
    lead_.shared[d] = memory_[at] == 1 && whole[at] != 1;
  }
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
  const int rank = int(t.dim()), lead = rank - tail;
  v.data = static_cast<char*>(t.data_ptr());
  static char none[64];
  if (v.data == nullptr) v.data = none;  // an empty tensor is still an argument that was given
  const auto strides = t.strides();
  const auto sizes = t.sizes();
  v.row = tail == 0 ? 0 : strides[size_t(lead)] * item;
  for (int d = 0; d < lead; ++d) {
    v.lead[lead_.rank - lead + d] = sizes[size_t(d)] == 1 ? 0 : strides[size_t(d)] * item;
  }
  return v;
}

Gradient::Gradient(Arguments& args, const Tensor* argument, bool wanted, Side side, int tail) {
  if (argument == nullptr || !wanted || argument->scalar_type() == ScalarType::Bool) return;
  dtype_ = argument->scalar_type();
  const auto own = argument->sizes();
  sizes_.assign(own.begin(), own.end());
  Sizes full = sizes_;
  if (side == Side::tokens || !kSumsInKernels) {
    full = args.sizes(side, {});
    full.insert(full.end(), sizes_.end() - tail, sizes_.end());
  }
  sum_ = empty(full, stats_type(dtype_));
  view_ = args.view(*sum_, tail);
}

void Gradient::zero() {
  if (sum_.has_value()) torch::stable::zero_(*sum_);
}

namespace {

// The sum over the leading dimensions that `sizes` lacks or has at 1.
Tensor sum_to(Tensor out, const Sizes& sizes) {
  const int64_t extra = out.dim() - int64_t(sizes.size());
  Sizes over;
  for (int64_t d = 0; d < out.dim(); ++d) {
    if (d < extra || (sizes[size_t(d - extra)] == 1 && out.size(d) != 1)) over.push_back(d);
  }
  if (over.empty()) return out;
  const torch::headeronly::IntHeaderOnlyArrayRef dims(over.data(), over.size());
  return torch::stable::reshape(torch::stable::sum(out, dims, true),
                                torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()));
}

}  // namespace

Tensor Gradient::result() const {
  if (!sum_.has_value()) return nothing();
  const Tensor out = sum_to(*sum_, sizes_);
  return out.scalar_type() == dtype_ ? out : torch::stable::to(out, dtype_);
}

TokenGradient::TokenGradient(Arguments& args, const Tensor* argument, bool wanted,
                             std::initializer_list<int64_t> tail) {
  if (argument == nullptr || !wanted) return;
  argument_ = argument;
  const Sizes sizes = args.sizes(Side::tokens, tail);
  int64_t numel = 1;
  for (int64_t s : sizes) numel *= s;
  for (int64_t s : tail) inner_ *= s;
  broadcast_ = numel != argument->numel();
  rows_ = empty(sizes, broadcast_ ? stats_type(argument->scalar_type()) : argument->scalar_type());
  tail_ = int(tail.size());
  view_ = args.view(*rows_, tail_);
}

#ifdef MK_CUDA
Tensor TokenGradient::result() const {
  if (!rows_.has_value()) return nothing();
  if (!broadcast_) return *rows_;
  Sizes sizes;
  for (int64_t s : argument_->sizes()) sizes.push_back(s);
  const Tensor sum = sum_to(*rows_, sizes);
  return sum.scalar_type() == argument_->scalar_type() ? sum : torch::stable::to(sum, argument_->scalar_type());
}
#else
namespace {

// to[own place] = sum of from[place] over the places that differ where `to` has size 1; `lead` leading dimensions of `from`.
template <class F>
void sum_places(const Tensor& from, int lead, int64_t inner, Tensor& to) {
  const int missing = int(from.dim() - to.dim());
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

Tensor TokenGradient::result() const {
  if (!rows_.has_value()) return nothing();
  if (!broadcast_) return *rows_;
  Sizes sizes;
  for (int64_t s : argument_->sizes()) sizes.push_back(s);
  Tensor sum = empty(sizes, rows_->scalar_type());
  const int lead = int(rows_->dim()) - tail_;
  if (sum.scalar_type() == ScalarType::Double) sum_places<double>(*rows_, lead, inner_, sum);
  else sum_places<float>(*rows_, lead, inner_, sum);
  return sum.scalar_type() == argument_->scalar_type() ? sum : torch::stable::to(sum, argument_->scalar_type());
}
#endif

}  // namespace mk
