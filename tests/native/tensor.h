// Tensors of the driver. Every one is a heap allocation of exactly its bytes, so that the address sanitizer sees the
// first byte that is read behind the last row.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "params/view.h"

namespace native {

using mk::DType;

inline bool is_half(DType d) { return d == DType::bf16 || d == DType::f16; }

// Small random numbers that are the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t next();
  int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }
  bool one_in(int64_t n) { return below(n) == 0; }
  double uniform(double lo, double hi) { return lo + (hi - lo) * double(next() >> 11) * 0x1p-53; }

 private:
  uint64_t state_;
};

// Where the rows of a tensor [leading dimensions it has, rows, cols] lie; a place is a row-major index over all leading
// dimensions.
struct Layout {
  mk::Lead lead;
  uint32_t has = 0;  // bit d: it has leading dimension d, otherwise it is broadcast there
  int64_t rows = 0, cols = 0;
  std::vector<int64_t> first;  // by place: the first of its rows

  Layout() = default;
  Layout(const mk::Lead& lead, uint32_t has, int64_t rows, int64_t cols);
  int64_t places() const { return int64_t(first.size()); }
  int64_t blocks() const;  // blocks of rows, one per combination of the leading dimensions that it has
};

// Numbers of one layout in double: what the formulas here read and write.
class Wide {
 public:
  Wide() = default;
  explicit Wide(const Layout& layout, double x = 0)
      : layout_(layout), data_(size_t(layout.blocks() * layout.rows * layout.cols), x) {}
  explicit operator bool() const { return layout_.places() > 0; }
  const Layout& layout() const { return layout_; }
  double* row(int64_t place, int64_t row) { return data_.data() + at(place, row); }
  const double* row(int64_t place, int64_t row) const { return data_.data() + at(place, row); }
  double& at_row(int64_t flat) { return data_[size_t(flat * layout_.cols)]; }
  std::vector<double>& all() { return data_; }
  const std::vector<double>& all() const { return data_; }

 private:
  int64_t at(int64_t place, int64_t row) const { return (layout_.first[size_t(place)] + row) * layout_.cols; }

  Layout layout_;
  std::vector<double> data_;
};

// The same as a kernel sees it, of any dtype. `gap`: elements between rows, poisoned.
class Tensor {
 public:
  Tensor() = default;  // not given
  Tensor(DType dtype, const Layout& layout, int64_t gap = 0);
  Tensor(DType dtype, const Wide& from, int64_t gap = 0) : Tensor(dtype, from.layout(), gap) { assign(from); }
  explicit operator bool() const { return layout_.places() > 0; }

  mk::View view() const;
  const Layout& layout() const { return layout_; }
  DType dtype() const { return dtype_; }
  int64_t row_bytes() const { return (layout_.cols + gap_) * mk::size_of(dtype_); }
  int64_t all_rows() const { return layout_.blocks() * layout_.rows; }

  void poison();  // every number NaN
  void assign(const Wide& from);
  Wide wide() const;  // of a bool mask: 0 and -inf
  std::string bytes() const { return std::string(data_.get(), size_t(bytes_)); }
  void break_one();  // the first number becomes another one

 private:
  double get(int64_t row, int64_t col) const;
  void set(int64_t row, int64_t col, double x);

  DType dtype_ = DType::f32;
  Layout layout_;
  int64_t gap_ = 0, bytes_ = 0;
  std::unique_ptr<char[]> data_;
};

// Numbers in [lo, hi) that `dtype` holds exactly, so that formula and kernel start from the same.
Tensor uniform(DType dtype, const Layout& layout, Random& random, double lo, double hi, int64_t gap = 0);
// Small multiples of 1/4: their sums of products are exact in float, so that equal scores are equal.
Tensor quarters(DType dtype, const Layout& layout, Random& random, int64_t gap = 0);

// What rounding to the dtype of `rounded` took from each finite number of `exact`.
Tensor rest_of(const Wide& exact, const Tensor& rounded);

// Empty where `got` agrees with `want` to `tolerance` of its largest number; else a sentence.
std::string difference(const Tensor& got, const Wide& want, double tolerance);

}  // namespace native
