#include "tensor.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

namespace native {
namespace {

double from_half(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  double x = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) x = mantissa != 0 ? std::nan("") : std::numeric_limits<double>::infinity();
  return h & 0x8000 ? -x : x;
}

// To nearest even, from numbers in the range of float.
uint16_t to_half(double x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double a = std::fabs(x);
  if (std::isnan(x)) return 0x7e00;
  if (a == 0) return sign;
  if (a >= 65520) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(a, &exponent);
  const int step = exponent < -13 ? -24 : exponent - 11;  // weight of the last bit
  const double n = std::nearbyint(std::ldexp(a, -step));
  if (step == -24) return uint16_t(sign | uint16_t(n));
  return uint16_t(sign | (((step + 24) << 10) + int(n)));
}

double from_bf16(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }
uint16_t to_bf16(double x) {
  const uint32_t u = std::bit_cast<uint32_t>(float(x));
  if (std::isnan(x)) return 0x7fc0;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// float8 e4m3fn: no infinity, and the largest magnitude is NaN.
double from_e4m3(uint8_t b) {
  const int exponent = b >> 3 & 15, mantissa = b & 7;
  double x = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  if ((b & 0x7f) == 0x7f) x = std::nan("");
  return b & 0x80 ? -x : x;
}

// To nearest even, from numbers up to 448.
uint8_t to_e4m3(double x) {
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  const double a = std::fabs(x);
  if (std::isnan(x)) return 0x7f;
  if (a == 0) return sign;
  int exponent = 0;
  std::frexp(a, &exponent);
  const int step = std::max(exponent - 4, -9);  // weight of the last bit
  return uint8_t(sign + 8 * (step + 9) + int(std::nearbyint(std::ldexp(a, -step))));
}

}  // namespace

uint64_t Random::next() {
  uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

Layout::Layout(const mk::Lead& lead, uint32_t has, int64_t rows, int64_t cols)
    : lead(lead), has(has), rows(rows), cols(cols) {
  const int64_t places = lead.batches() * lead.folded();
  for (int64_t place = 0; place < places; ++place) {
    int64_t rest = place, block = 0, stride = 1;
    for (int d = lead.rank - 1; d >= 0; --d) {
      const int64_t i = rest % lead.size[d];
      rest /= lead.size[d];
      if ((has >> d & 1) == 0) continue;
      block += i * stride;
      stride *= lead.size[d];
    }
    first.push_back(block * rows);
  }
}

int64_t Layout::blocks() const {
  int64_t n = places() > 0;
  for (int d = 0; d < lead.rank; ++d) n *= has >> d & 1 ? lead.size[d] : 1;
  return n;
}

Tensor::Tensor(DType dtype, const Layout& layout, int64_t gap) : dtype_(dtype), layout_(layout), gap_(gap) {
  const int64_t all = all_rows();
  bytes_ = all == 0 ? 0 : (all - 1) * row_bytes() + layout.cols * mk::size_of(dtype);
  data_.reset(new char[size_t(bytes_)]);
  poison();
}

void Tensor::poison() { std::memset(data_.get(), 0xff, size_t(bytes_)); }

mk::View Tensor::view() const {
  mk::View v;
  if (!*this) return v;
  v.data = data_.get();
  v.dtype = dtype_;
  v.row = row_bytes();
  int64_t stride = layout_.rows * v.row;
  for (int d = layout_.lead.rank - 1; d >= 0; --d) {
    if ((layout_.has >> d & 1) == 0) continue;
    v.lead[d] = layout_.lead.size[d] == 1 ? 0 : stride;
    stride *= layout_.lead.size[d];
  }
  return v;
}

double Tensor::get(int64_t row, int64_t col) const {
  const char* p = data_.get() + row * row_bytes() + col * mk::size_of(dtype_);
  auto as = [p](auto x) {
    std::memcpy(&x, p, sizeof x);
    return x;
  };
  switch (dtype_) {
    case DType::f32: return as(0.0f);
    case DType::f64: return as(0.0);
    case DType::bf16: return from_bf16(as(uint16_t(0)));
    case DType::f16: return from_half(as(uint16_t(0)));
    case DType::boolean: return *p != 0 ? 0 : -std::numeric_limits<double>::infinity();
    case DType::i8: return as(int8_t(0));
    case DType::e4m3: return from_e4m3(as(uint8_t(0)));
    default: return double(as(int64_t(0)));
  }
}

void Tensor::set(int64_t row, int64_t col, double x) {
  char* p = data_.get() + row * row_bytes() + col * mk::size_of(dtype_);
  auto put = [p](auto x) { std::memcpy(p, &x, sizeof x); };
  switch (dtype_) {
    case DType::f32: return put(float(x));
    case DType::f64: return put(x);
    case DType::bf16: return put(to_bf16(x));
    case DType::f16: return put(to_half(float(x)));
    case DType::boolean: return put(char(x == 0));
    // int8 has no NaN: its scale is NaN instead
    case DType::i8: return put(std::isnan(x) ? int8_t(-1) : int8_t(std::nearbyint(x)));
    case DType::e4m3: return put(to_e4m3(x));
    default: return put(int64_t(x));
  }
}

void Tensor::assign(const Wide& from) {
  const double* x = from.all().data();
  for (int64_t row = 0; row < all_rows(); ++row) {
    for (int64_t col = 0; col < layout_.cols; ++col) set(row, col, *x++);
  }
}

Wide Tensor::wide() const {
  if (!*this) return {};
  Wide out(layout_);
  double* x = out.all().data();
  for (int64_t row = 0; row < all_rows(); ++row) {
    for (int64_t col = 0; col < layout_.cols; ++col) *x++ = get(row, col);
  }
  return out;
}

void Tensor::break_one() {
  if (all_rows() * layout_.cols > 0) set(0, 0, get(0, 0) + 1000);
}

Tensor uniform(DType dtype, const Layout& layout, Random& random, double lo, double hi, int64_t gap) {
  Wide x(layout);
  for (double& v : x.all()) v = random.uniform(lo, hi);
  return Tensor(dtype, x, gap);
}

Tensor quarters(DType dtype, const Layout& layout, Random& random, int64_t gap) {
  Wide x(layout);
  for (double& v : x.all()) v = double(random.below(9) - 4) / 4;
  return Tensor(dtype, x, gap);
}

Tensor rest_of(const Wide& exact, const Tensor& rounded) {
  Wide rest = exact;
  const Wide stored = rounded.wide();
  for (size_t i = 0; i < rest.all().size(); ++i) {
    const double x = exact.all()[i];
    rest.all()[i] = std::isfinite(x) ? x - stored.all()[i] : 0;
  }
  return Tensor(rounded.dtype(), rest);
}

std::string difference(const Tensor& got, const Wide& want, double tolerance) {
  const Wide have = got.wide();
  double largest = 1;
  for (double x : want.all()) largest = std::isfinite(x) ? std::max(largest, std::fabs(x)) : largest;
  const int64_t cols = got.layout().cols;
  for (size_t i = 0; i < want.all().size(); ++i) {
    const double a = have.all()[i], b = want.all()[i];
    if (a == b || std::fabs(a - b) <= tolerance * largest) continue;
    char text[160];
    std::snprintf(text, sizeof text, "row %lld, column %lld: %.9g, expected %.9g", (long long)(int64_t(i) / cols),
                  (long long)(int64_t(i) % cols), a, b);
    return text;
  }
  return "";
}

}  // namespace native
