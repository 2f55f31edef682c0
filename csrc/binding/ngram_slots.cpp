#include "params/ngram_slots.h"

#include "binding/binding.h"

namespace mk {
namespace {

constexpr const char* kOp = "ngram_slots";

// A list of numbers, contiguous.
const int64_t* numbers(Arguments& args, const char* name, const Tensor& t, int64_t& n) {
  n = size_at(kOp, name, t, 0);
  const Tensor& all = args.add(name, t, Side::memory, {n});
  check(all.dim() == 1 && all.scalar_type() == ScalarType::Long, kOp, ": ", name, " must be int64 of one dimension");
  static const int64_t none[1] = {};
  const void* data = all.data_ptr();
  return data == nullptr ? none : static_cast<const int64_t*>(data);
}
const int64_t* numbers(Arguments& args, const char* name, const std::optional<Tensor>& t, int64_t& n) {
  n = 0;
  return t.has_value() ? numbers(args, name, *t, n) : nullptr;
}

void check_sizes(const NgramSlots& p, const std::vector<int64_t>& orders) {
  check(p.heads >= 1 && p.M == int64_t(orders.size()) * p.heads && !orders.empty(), kOp,
        ": sizes must have len(orders) * heads numbers, got ", p.M);
  for (int64_t order : orders) {
    check(order >= 1 && order <= p.n_max, kOp, ": orders must be in [1, ", p.n_max, "], the multipliers, got ", order);
  }
  int64_t all = 0;
  for (int64_t m = 0; m < p.M; ++m) {
    check(p.sizes[m] >= 1, kOp, ": sizes must be at least 1, got ", p.sizes[m]);
    check(!__builtin_add_overflow(all, p.sizes[m], &all), kOp, ": the sum of sizes must be below 2^63");
  }
}

Tensor run(const Tensor& tokens, const Tensor& sizes, const Tensor& multipliers, const std::optional<Tensor>& token_map,
           const std::optional<Tensor>& history, const std::optional<Tensor>& first,
           const std::optional<Tensor>& ignore, const std::vector<int64_t>& orders, int64_t heads, int64_t pad) {
  NgramSlots p;
  Arguments args(kOp);
  p.T = size_at(kOp, "tokens", tokens, -1), p.heads = heads, p.pad = pad;
  const Tensor* rows[3] = {&args.add("tokens", tokens, Side::tokens, {p.T})};
  p.sizes = numbers(args, "sizes", sizes, p.M);
  p.multipliers = numbers(args, "multipliers", multipliers, p.n_max);
  p.token_map = numbers(args, "token_map", token_map, p.vocabulary);
  p.ignore = numbers(args, "ignore", ignore, p.ignored);
  p.orders = orders.data();
  check_sizes(p, orders);
  rows[1] = args.add("history", history, Side::tokens, {p.n_max - 1});
  rows[2] = args.add("first", first, Side::tokens, {p.T});
  for (const Tensor* t : rows) {
    args.require(t == nullptr || t->scalar_type() == ScalarType::Long, "tokens, history and first must be int64");
  }
  p.lead = args.lead();
  // The tokens of a stream are its row.
  p.tokens = args.view(rows[0], 1), p.history = args.view(rows[1], 1), p.first = args.view(rows[2], 1);
  Tensor slots = empty(args.sizes(Side::tokens, {p.T, p.M}), ScalarType::Long);
  p.slots = static_cast<int64_t*>(slots.mutable_data_ptr());
  const int64_t wrong = MK_CALL(ngram_slots, p);
  check(wrong == -1, kOp, ": tokens must be below ", p.vocabulary, ", the length of token_map, got ", wrong);
  return slots;
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) { MK_OPERATOR(m, "ngram_slots", &mk::run); }
