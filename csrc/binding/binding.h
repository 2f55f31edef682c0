// From torch tensors to kernel parameters: checks, leading dimensions, allocation. The only file that knows both.
//
// The checks here keep memory safe, whoever calls the operator. The detailed error messages come from
// memkernels/spec.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <deque>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "binding/place.h"
#include "params/isa.h"
#include "params/view.h"

// Registers kernels for operators of this library's backend, on its device.
#define MK_REGISTER_IN(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)
#define MK_REGISTER(m) MK_REGISTER_IN(MK_LIBRARY, MK_KEY, m)
// Registers `function` as the kernel of the operator `name`, and of its overload `name.direct`, which has no autograd
// layer (memkernels/registration.py).
#define MK_OPERATOR(m, name, function)                                                                   \
  mk::add_operator(m, name, name ".direct", [](StableIValue* stack, uint64_t inputs, uint64_t outputs) { \
    mk::call_operator(name, TORCH_BOX(function), stack, inputs, outputs);                                \
  })

namespace mk {

enum class Side { tokens, memory };

// Raises an error with this message, without file and line. Every native entry point refuses a call this way.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}
template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) fail(parts...);
}

// Runs a boxed operator and turns a failed allocation into an error that names the operator.
using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);
void call_operator(const char* op, Boxed function, StableIValue* stack, uint64_t inputs, uint64_t outputs);

inline void add_operator(torch::stable::detail::StableLibrary& library, const char* name, const char* direct,
                         Boxed function) {
  library.impl(name, function).impl(direct, function);
}

DType dtype_of(const char* op, const char* name, const Tensor& t);

inline Tensor nothing() { return empty({0}, ScalarType::Float); }
inline Tensor zeros_like(const Tensor& t) {
  return made(bytes_of(t), [&] { return torch::stable::new_zeros(t, t.sizes()); });
}
inline ScalarType stats_type(ScalarType t) { return t == ScalarType::Double ? t : ScalarType::Float; }

// The tensor arguments of one call. add() them all, then call lead(), then view() them and the results.
class Arguments {
 public:
  explicit Arguments(const char* op) : op_(op) {}

  // Adds a tensor whose trailing dimensions must be `tail`. Returns it with a contiguous last dimension, by a reference
  // that stays valid.
  const Tensor& add(const char* name, const Tensor& t, Side side, std::initializer_list<int64_t> tail);
  const Tensor* add(const char* name, const std::optional<Tensor>& t, Side side, std::initializer_list<int64_t> tail) {
    return t.has_value() ? &add(name, *t, side, tail) : nullptr;
  }

  // Adds the slots [first, stop) that each of T tokens may address: int64 [T, 2].
  const Tensor* ranges(const std::optional<Tensor>& slot_range, int64_t T);

  // Requires all given tensors to be float32, bfloat16 or float16, or all to be float64.
  void floats(std::initializer_list<const Tensor*> tensors) const;
  // Requires rows of slots to be floats like `like`, or int8 or float8_e4m3fn with a scale per slot in float32 (float64
  // if `like` is float64).
  void slots(const Tensor& rows, const Tensor* scale, const Tensor& like) const;
  // Requires a mask to be bool, or float as `like` allows.
  void mask(const Tensor* mask, const Tensor& like) const;

  // Requires float32, or float64 if `like` is float64: the dtype of sums.
  void stats(std::initializer_list<const Tensor*> tensors, const Tensor& like) const;

  const Lead& lead();
  // The sizes of a result: the leading dimensions (for Side::memory those of the memory alone), then `tail`.
  Sizes sizes(Side side, std::initializer_list<int64_t> tail);
  // `tail` is the number of trailing dimensions: 2 for rows, 1 for numbers.
  View view(const Tensor& t, int tail) const;
  SlotView slot_view(const Tensor* rows, const Tensor* scale) const { return {view(rows, 2), view(scale, 1)}; }
  View view(const Tensor* t, int tail) const { return t == nullptr ? View{} : view(*t, tail); }
  void require(bool holds, const char* what) const { check(holds, op_, ": ", what); }
  const char* op() const { return op_; }

 private:
  void check_work() const;

  struct Item {
    const char* name;
    Tensor tensor;
    Side side;
    int tail;
    torch::headeronly::IntHeaderOnlyArrayRef sizes;  // owned by `tensor`

    int64_t own(int d) const { return sizes[sizes.size() - size_t(tail) + size_t(d)]; }
  };
  const char* op_;
  Place place_;
  std::deque<Item> items_;  // a deque, since add() returns references into it
  Lead lead_;
  int64_t memory_[kMaxLead];
  int memory_rank_ = 0;
  bool ready_ = false;
};

// Fails if the storage of a tensor ends before its last element.
void check_storage(const char* op, const char* name, const Tensor& t);
// The size of dimension `d` (negative: from the end). Fails if the tensor has too few dimensions or more than kMaxSize
// there.
constexpr int64_t kMaxSize = int64_t(1) << 40;
int64_t size_at(const char* op, const char* name, const Tensor& t, int64_t d);

// The scales of compressed keys and values, one number per slot.
struct Scales {
  std::optional<Tensor> keys, values;
};

// A gradient in float (double): kernels write it, result() returns it in the shape and dtype of its argument.
class Gradient {
 public:
  // Memory arguments: kernels sum over leading dimensions that the argument lacks (if kSumsInKernels, else as for token
  // arguments). Token arguments: kernels write all leading dimensions, and result() sums those that the argument lacks.
  // If not wanted, the view is empty. `tail` is the number of trailing dimensions: 2 for rows, 1 for numbers. `own`:
  // the kernel rounds to the dtype of the argument, except where result() has to sum.
  Gradient(Arguments& args, const Tensor* argument, bool wanted, Side side, int tail, bool own = false);
  View view() const { return view_; }
  void zero();  // for calls in which no kernel runs
  Tensor result() const;

 private:
  std::optional<Tensor> sum_;
  Sizes sizes_;
  ScalarType dtype_ = ScalarType::Float;
  int tail_ = 0;
  View view_;
};

}  // namespace mk
