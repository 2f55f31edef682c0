// The cases that every kernel runs, and what their tests share.
#pragma once

#include <functional>
#include <initializer_list>
#include <limits>

#include "params/choice.h"
#include "pool.h"
#include "tensor.h"

namespace native {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

enum class Mask { none, boolean, number, small };  // small: in the dtype of the query

struct Case {
  int64_t T, N, K, V, k;
  DType dtype, content;              // of query and keys; of values and writes
  DType packed_keys, packed_values;  // the same if 8-bit slots are supported: int8 or float8 in one case of three
  Mask mask;
  int leads;    // index of the combination of leading dimensions
  int64_t gap;  // elements between the rows of inputs
  uint64_t seed;

  // Leading dimensions, and which of them each argument has.
  mk::Lead lead;
  uint32_t all, memory, query, keys, values;

  Layout tokens(int64_t cols) const { return {lead, all, T, cols}; }
  Layout slots(int64_t cols) const { return {lead, memory, N, cols}; }
  Layout of(uint32_t has, int64_t rows, int64_t cols) const { return {lead, has, rows, cols}; }
  int64_t places() const { return lead.batches() * lead.folded(); }
  DType stats() const { return dtype == DType::f64 ? DType::f64 : DType::f32; }
  double tolerance(DType of) const;
  std::string text() const;
};

// Every density-th case of the grid; large ones are rarer.
void each_case(int density, const std::function<void(const Case&)>& body);

// What a kernel must leave in an output.
struct Result {
  const char* name;
  Tensor* got;
  const Wide* want;
};

// The allowed error of a result, relative to its largest number.
double tolerance(const Case& c, const std::string& entry, mk::Isa isa, const Result& result);

// Runs `call` for every instruction set with one and with four threads into poisoned outputs, and compares. An output
// that is not given is not wanted. The program `out_of_memory` has its own verify(), which also lets every allocation
// fail in turn.
void verify(const Case& c, const char* entry, std::initializer_list<Result> results, const std::function<void()>& call);

// The number of compared runs, and of wrong ones.
struct Tally {
  int64_t runs = 0, failures = 0;
};
extern Tally tally;

// A slot mask of the case: multiples of 1/4 around `shift`, with empty slots among them. Not given for Mask::none.
Tensor slot_mask(const Case& c, Random& random, double shift = 0);
// Ranges of slots for every token, int64 [T, 2]; some are empty, or reach beyond the slots. In one call of two.
Tensor slot_range(const Case& c, Random& random);
// Sets the scores [T, N] of a place to -inf outside of the ranges, if there are any.
void close(const Case& c, const Wide& range, int64_t place, std::vector<double>& scores);
// A gradient, not wanted in one call of four.
Wide gradient(Random& random, const Layout& layout);
Wide gradient(Random& random, const Tensor& mask);  // also not wanted if the mask is bool or missing
// Sets rows of memory that no batch of the call may address to NaN: no kernel may read them.
void poison_empty(const Wide& mask, Tensor& rows);

// Rows of slots: floats, or 8-bit numbers with a scale per slot.
struct SlotRows {
  Tensor rows, scale;  // no scale: floats

  // Numbers in [-1, 1), times any scale; or with `exact`, numbers whose sums of products with quarters are exact in
  // float.
  SlotRows(const Case& c, DType dtype, uint32_t has, int64_t cols, Random& random, bool exact = false);
  bool packed() const { return bool(scale); }
  mk::SlotView view() const { return {rows.view(), scale.view()}; }
  Wide wide() const;  // times the scale
  void poison_empty(const Wide& mask);
  // Only for floats.
  Wide gradient(Random& random) const { return packed() ? Wide() : native::gradient(random, rows.layout()); }
};

// A gradient of memory from the tokens that chose it: written whole, in the dtype of the argument.
inline mk::MemoryGradient whole(const Tensor& t) { return {t.view(), t.all_rows()}; }
// The dtype of the gradient of a token argument: its own, unless it is broadcast and rows are summed later.
inline DType token_dtype(const Case& c, const Tensor& argument, uint32_t all) {
  return argument.layout().has == all ? argument.dtype() : c.stats();
}

// The batches whose tokens write to one memory, in the order of the writes.
std::vector<std::vector<int64_t>> memories(const Case& c);
// scale <query_t, key_i> + mask_i of one batch, [T][N]; -inf in empty slots, whatever their keys hold.
std::vector<double> scores(const Case& c, const Wide& query, const Wide& keys, const Wide& mask, double scale,
                           int64_t place);
inline double dot(const double* x, const double* y, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}
// y += a x
inline void add(double a, const double* x, int64_t n, double* y) {
  for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

// From the gradient of a score to those of its query, key and mask. A gradient that is not given is not wanted.
struct ScoreGradients {
  const Wide *query, *keys;
  Wide *d_query, *d_keys, *d_mask;
  double scale;

  void add_score(int64_t place, int64_t t, int64_t i, double ds) const;
};

}  // namespace native
