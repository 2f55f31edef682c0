#include "grid.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace native {

Tally tally;

namespace {

constexpr DType kDtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};
constexpr int64_t kTokens[] = {0, 1, 3, 8, 9, 63, 65, 130};
constexpr int64_t kSlots[] = {0, 1, 3, 64, 97, 257, 1100};
constexpr int64_t kWidths[] = {1, 3, 8, 16, 33, 64, 100};
constexpr int64_t kNeighbours[] = {1, 2, 3, 8, 33, 130};

// Leading dimensions, and as bits which arguments have them. A dimension that no memory argument has is shared by
// tokens.
struct Leads {
  int rank;
  int64_t size[2];
  uint32_t query, keys, values;
};
constexpr Leads kLeads[] = {
    {0, {}, 0, 0, 0},     {1, {2}, 1, 1, 1},  // a memory for every stream
    {1, {3}, 1, 0, 0},                        // one memory for all
    {2, {2, 3}, 3, 1, 1},                     // grouped heads
    {2, {3, 2}, 3, 2, 0},                     // shared, and values for two sets of keys
    {2, {2, 2}, 2, 3, 1},                     // tokens and values that are broadcast over memories
    {1, {9}, 1, 1, 1},                        // as many batches as run in parallel
};

void settle(Case& c) {
  const Leads& l = kLeads[c.leads];
  c.all = (1u << l.rank) - 1;
  c.query = l.query, c.keys = l.keys, c.values = l.values;
  c.memory = l.keys | l.values;
  c.lead.rank = l.rank;
  for (int d = 0; d < l.rank; ++d) {
    c.lead.size[d] = l.size[d];
    c.lead.shared[d] = (c.memory >> d & 1) == 0;
  }
}

const char* name_of(DType d) {
  switch (d) {
    case DType::f32: return "f32";
    case DType::f64: return "f64";
    case DType::bf16: return "bf16";
    case DType::f16: return "f16";
    case DType::i8: return "i8";
    default: return "e4m3";
  }
}

}  // namespace

double Case::tolerance(DType of) const {
  switch (of) {
    case DType::f64: return 1e-11;
    case DType::f32: return 5e-5;
    case DType::f16: return 2e-3;
    case DType::i64: return 0;
    default: return 1.2e-2;
  }
}

std::string Case::text() const {
  char s[200];
  std::snprintf(s, sizeof s, "T=%lld N=%lld K=%lld V=%lld k=%lld %s/%s (%s/%s) mask=%d leads=%d gap=%lld", (long long)T,
                (long long)N, (long long)K, (long long)V, (long long)k, name_of(dtype), name_of(content),
                name_of(packed_keys), name_of(packed_values), int(mask), leads, (long long)gap);
  return s;
}

void each_case(int density, const std::function<void(const Case&)>& body) {
  constexpr int64_t kLarge = 16000;  // tokens times slots
  uint64_t seed = 0;
  for (int64_t T : kTokens) {
    for (int64_t N : kSlots) {
      for (DType dtype : kDtypes) {
        for (size_t w = 0; w < std::size(kWidths); ++w) {
          Random random(++seed);
          const bool large = T * N > kLarge;
          if (!random.one_in(density * (large ? 9 : 1))) continue;
          Case c;
          c.T = T, c.N = N, c.seed = seed;
          c.K = kWidths[w], c.V = kWidths[size_t(random.below(std::size(kWidths)))];
          c.k = kNeighbours[random.below(std::size(kNeighbours))];
          c.dtype = dtype;
          c.content = is_half(dtype) && random.one_in(3) ? DType::f32 : dtype;
          c.mask = Mask(random.below(4));
          c.leads = int(random.below(large ? 4 : std::size(kLeads)));
          c.gap = random.one_in(3) ? 3 : 0;
          auto packed = [&](DType own) { return !random.one_in(3) ? own : random.one_in(2) ? DType::i8 : DType::e4m3; };
          c.packed_keys = packed(c.dtype), c.packed_values = packed(c.content);
          settle(c);
          body(c);
        }
      }
    }
  }
}

double tolerance(const Case& c, const std::string& entry, mk::Isa isa, const Result& r) {
  // Products of pairs round the weights and the gradients of scores, from which these gradients of bfloat16 rows are
  // summed.
  const std::string name = r.name;
  const bool rounds = isa == mk::Isa::avx512bf16 && c.dtype == DType::bf16 &&
                      (entry == "softmax_read_backward" || entry == "address_backward") &&
                      (name == "d_query" || name == "d_keys" || name == "d_values");
  return c.tolerance(rounds ? DType::bf16 : r.got->dtype());
}

Tensor slot_mask(const Case& c, Random& random, double shift) {
  if (c.mask == Mask::none) return {};
  const uint32_t has = random.one_in(2) ? c.keys : 0;
  Wide x(c.of(has, c.N, 1));
  const int64_t rarity = random.one_in(4) ? 1 : 3;  // now and then every slot is empty
  for (double& m : x.all()) m = random.one_in(rarity) ? -kInfinity : shift + double(random.below(9) - 4) / 4;
  if (c.mask == Mask::boolean) {
    for (double& m : x.all()) m = std::isinf(m) ? m : 0;
  }
  return Tensor(c.mask == Mask::boolean ? DType::boolean : c.mask == Mask::number ? c.stats() : c.dtype, x);
}

Tensor slot_range(const Case& c, Random& random) {
  if (random.one_in(2)) return {};
  Wide ends(c.of(random.one_in(2) ? c.all : c.query, c.T, 2));
  std::vector<double>& x = ends.all();
  for (size_t t = 0; t < x.size(); t += 2) {
    const bool all = random.one_in(4);
    x[t] = all ? -3 : double(random.below(c.N + 6) - 3);
    x[t + 1] = all ? double(c.N + 3) : x[t] + double(random.below(c.N + 6) - 2);
  }
  return Tensor(DType::i64, ends);
}

void close(const Case& c, const Wide& range, int64_t place, std::vector<double>& scores) {
  for (int64_t t = 0; range && t < c.T; ++t) {
    const double* ends = range.row(place, t);
    for (int64_t i = 0; i < c.N; ++i) {
      if (double(i) < ends[0] || double(i) >= ends[1]) scores[size_t(t * c.N + i)] = -kInfinity;
    }
  }
}

Wide gradient(Random& random, const Layout& layout) { return random.one_in(4) ? Wide() : Wide(layout); }
Wide gradient(Random& random, const Tensor& mask) {
  return !mask || mask.dtype() == DType::boolean ? Wide() : gradient(random, mask.layout());
}

void poison_empty(const Wide& mask, Tensor& rows) {
  if (!mask) return;
  const Layout& l = rows.layout();
  std::vector<bool> used(size_t(rows.all_rows()));
  for (int64_t place = 0; place < l.places(); ++place) {
    for (int64_t i = 0; i < l.rows; ++i) {
      if (*mask.row(place, i) != -kInfinity) used[size_t(l.first[size_t(place)] + i)] = true;
    }
  }
  Wide x = rows.wide();
  for (int64_t row = 0; row < rows.all_rows(); ++row) {
    if (!used[size_t(row)]) std::fill_n(&x.at_row(row), l.cols, std::nan(""));
  }
  rows.assign(x);
}

SlotRows::SlotRows(const Case& c, DType dtype, uint32_t has, int64_t cols, Random& random, bool exact) {
  const Layout layout = c.of(has, c.N, cols);
  if (!mk::is_compressed(dtype)) {
    rows = exact ? quarters(dtype, layout, random, c.gap) : uniform(dtype, layout, random, -1, 1, c.gap);
    return;
  }
  const double largest = exact ? 4 : dtype == DType::i8 ? 127 : 1 << random.below(9);  // float8: also below its normals
  Wide x(layout), s(c.of(random.one_in(3) ? 0 : has, c.N, 1));
  for (double& v : x.all()) v = exact ? double(random.below(9) - 4) : random.uniform(-largest, largest);
  for (double& v : s.all()) v = exact ? 1.0 / double(int64_t(2) << random.below(3)) : random.uniform(0.1, 1) / largest;
  rows = Tensor(dtype, x, c.gap), scale = Tensor(c.stats(), s, c.gap);
}

Wide SlotRows::wide() const {
  if (!packed()) return rows.wide();
  const Wide x = rows.wide(), s = scale.wide();
  const Layout &l = rows.layout(), &of_scale = scale.layout();
  Wide out(Layout(l.lead, l.has | of_scale.has, l.rows, l.cols));
  for (int64_t place = 0; place < l.places(); ++place) {
    for (int64_t i = 0; i < l.rows; ++i) {
      double* row = out.row(place, i);
      for (int64_t col = 0; col < l.cols; ++col) row[col] = x.row(place, i)[col] * *s.row(place, i);
    }
  }
  return out;
}

void SlotRows::poison_empty(const Wide& mask) {
  native::poison_empty(mask, rows);
  if (packed()) native::poison_empty(mask, scale);
}

std::vector<std::vector<int64_t>> memories(const Case& c) {
  const Layout slots = c.slots(1);
  std::vector<std::vector<int64_t>> places(size_t(slots.blocks()));
  const Layout blocks(c.lead, c.memory, 1, 1);
  for (int64_t place = 0; place < c.places(); ++place) places[size_t(blocks.first[size_t(place)])].push_back(place);
  return places;
}

std::vector<double> scores(const Case& c, const Wide& query, const Wide& keys, const Wide& mask, double scale,
                           int64_t place) {
  std::vector<double> s(size_t(c.T * c.N), -kInfinity);
  for (int64_t i = 0; i < c.N; ++i) {
    const double m = mask ? *mask.row(place, i) : 0;
    if (m == -kInfinity) continue;
    const double* key = keys.row(place, i);
    for (int64_t t = 0; t < c.T; ++t) s[size_t(t * c.N + i)] = scale * dot(query.row(place, t), key, c.K) + m;
  }
  return s;
}

void ScoreGradients::add_score(int64_t place, int64_t t, int64_t i, double ds) const {
  const int64_t K = keys->layout().cols;
  if (*d_query) add(scale * ds, keys->row(place, i), K, d_query->row(place, t));
  if (*d_keys) add(scale * ds, query->row(place, t), K, d_keys->row(place, i));
  if (*d_mask) *d_mask->row(place, i) += ds;
}

}  // namespace native
