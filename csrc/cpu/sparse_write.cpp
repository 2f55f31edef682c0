// sparse_write:  v_i <- v_i (1 - a e_t) + a w_t  for the entries (t, j) that name slot i, in order, a = weights[t, j].
//
// Slots do not depend on one another. So entries are sorted by slot, and within a slot by position: a slot is read
// once, takes its entries in float, and is rounded and written once. Slots are assigned to parts by their number. Every
// part finds and sorts its own entries, so the cost is O(T k V + parts T k), whatever N is. Lanes run along the value
// width. Bound by the bandwidth of scattered rows.
//
// Backward, g = dV' of a slot, walking its entries from the last; v before each of them is recomputed from values
// stored at every kSteps-th:
//   da = <g, w - e v>,  dw_t += a g,  de_t -= a g v,  g <- g (1 - a e),  dV = g in the end
// dw and de are sums over the slots of a token. So tasks are stripes of columns, which own their columns of dw and de.
// They leave partial da, which are added in the order of the stripes.
#include "params/sparse_write.h"

#include <algorithm>

#include "cpu/tiles/parallel.h"
#include "cpu/tiles/scores.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t kParts = 16, kStripes = 8, kSteps = 64;

struct Entry {
  int64_t slot, at;  // at = t * k + j
};

// The entries of all batches, [batch][part], each list sorted.
class Entries {
 public:
  // Tokens that `token_mask` leaves out have no entries.
  Entries(const Choice& c, const View& token_mask)
      : parts_(c.tokens() * c.k < 4096 ? 1 : kParts),
        sizes_(c.lead.batches() * parts_ + 1),
        all_(c.all_tokens() * c.k) {
    const int64_t tasks = c.lead.batches() * parts_;
    auto each = [&](int64_t task, auto&& body) {
      const TokenRows rows(c.indices, c.lead, task / parts_, c.T), mask(token_mask, c.lead, task / parts_, c.T);
      const int64_t part = task % parts_;
      for (int64_t t = 0; t < c.tokens(); ++t) {
        if (mask && *mask.row(t) == 0) continue;
        const auto* index = reinterpret_cast<const int64_t*>(rows.row(t));
        for (int64_t j = 0; j < c.k; ++j) {
          if (index[j] >= 0 && index[j] % parts_ == part) body(Entry{index[j], t * c.k + j});
        }
      }
    };
    int64_t* starts = sizes_.data();
    parallel(tasks, 0, [&](int64_t task, char*) {
      int64_t n = 0;
      each(task, [&](const Entry&) { ++n; });
      starts[task + 1] = n;
    });
    starts[0] = 0;
    for (int64_t task = 0; task < tasks; ++task) starts[task + 1] += starts[task];
    parallel(tasks, 0, [&](int64_t task, char*) {
      Entry* own = all_.data() + starts[task];
      int64_t n = 0;
      each(task, [&](const Entry& e) { own[n++] = e; });
      std::sort(own, own + n,
                [](const Entry& x, const Entry& y) { return x.slot != y.slot ? x.slot < y.slot : x.at < y.at; });
    });
  }
  int64_t parts() const { return parts_; }

  // Calls body(slot, its entries, their number) for every slot of a part.
  template <class Body>
  void each_slot(int64_t batch, int64_t part, Body&& body) {
    const int64_t* starts = sizes_.data() + batch * parts_ + part;
    const Entry *e = all_.data() + starts[0], *end = all_.data() + starts[1];
    while (e < end) {
      const Entry* last = e;
      while (last < end && last->slot == e->slot) ++last;
      body(e->slot, e, last - e);
      e = last;
    }
  }
  int64_t longest(int64_t batches) {
    int64_t most_entries = 0;
    for (int64_t b = 0; b < batches; ++b) {
      for (int64_t p = 0; p < parts_; ++p) {
        each_slot(b, p, [&](int64_t, const Entry*, int64_t n) { most_entries = most(most_entries, n); });
      }
    }
    return most_entries;
  }

 private:
  int64_t parts_;
  Buffer<int64_t> sizes_;
  Buffer<Entry> all_;
};

// Columns [first, first + width) of the token rows that a slot needs, as F, padded with zeros to whole registers.
template <class F>
class Columns {
 public:
  Columns(const SparseWrite& p, int64_t batch, int64_t first, int64_t width, Arena& arena)
      : weights_(p.weights, p.choice.lead, batch, p.choice.T),
        write_(p.write, p.choice.lead, batch, p.choice.T),
        erase_(p.erase, p.choice.lead, batch, p.choice.T),
        k_(p.choice.k),
        first_(first),
        width_(width),
        w_(arena.take<F>(round_up(width, kLanes<F>))),
        e_(arena.take<F>(round_up(width, kLanes<F>))) {
    for (int64_t x = 0; x < round_up(width, kLanes<F>); ++x) w_[x] = 0, e_[x] = F(p.erase_scale);
  }
  F weight(int64_t at) const {
    F a;
    read_row<F>(weights_.row(at / k_) + at % k_ * size_of(weights_.dtype), weights_.dtype, 1, &a);
    return a;
  }
  const F* write(int64_t at) const { return row(write_, at, w_); }
  const F* erase(int64_t at) const { return erase_ ? row(erase_, at, e_) : e_; }

 private:
  const F* row(const TokenRows& rows, int64_t at, F* buffer) const {
    read_row<F>(rows.row(at / k_) + first_ * size_of(rows.dtype), rows.dtype, width_, buffer);
    return buffer;
  }

  TokenRows weights_, write_, erase_;
  int64_t k_, first_, width_;
  F *w_, *e_;
};

// This form is exact for gates of exactly 0 or 1.
template <class F>
MK_INLINE void step(F a, const F* w, const F* e, int64_t padded, F* v) {
  for (int64_t x = 0; x < padded; x += kLanes<F>) {
    const Vec<F> old = load<F>(v + x);
    store<F>(v + x, old * (F(1) - a * load<F>(e + x)) + a * load<F>(w + x));
  }
}

// Copies rows of one tensor to another of the same dtype, both [lead, N, V].
void copy_rows(const Lead& lead, int64_t N, int64_t V, const View& from, const View& to) {
  constexpr int64_t kRows = 1024;
  const int64_t blocks = div_up(N, kRows);
  parallel(lead.batches() * blocks, 0, [&](int64_t task, char*) {
    const char* in = from.batch(lead, task / blocks);
    char* out = to.batch(lead, task / blocks);
    for (int64_t i = task % blocks * kRows; i < least(N, (task % blocks + 1) * kRows); ++i) {
      std::memcpy(out + i * to.row, in + i * from.row, size_t(V * size_of(from.dtype)));
    }
  });
}

template <class F>
void forward(const SparseWrite& p) {
  const Choice& c = p.choice;
  if (p.out.data != p.values.data) copy_rows(c.lead, c.N, p.V, p.values, p.out);
  Entries entries(c, p.token_mask);
  const int64_t padded = round_up(p.V, kLanes<F>);
  parallel(c.lead.batches() * entries.parts(), size_t(3 * padded) * sizeof(F) + 4 * 64,
           [&](int64_t task, char* memory) {
             FlushDenormals flush;
             Arena arena(memory);
             const int64_t batch = task / entries.parts();
             const Columns<F> columns(p, batch, 0, p.V, arena);
             F* v = arena.take<F>(padded);
             for (int64_t x = p.V; x < padded; ++x) v[x] = 0;
             char* out = p.out.batch(c.lead, batch);
             entries.each_slot(batch, task % entries.parts(), [&](int64_t slot, const Entry* e, int64_t n) {
               char* row = out + slot * p.out.row;
               read_row<F>(row, p.out.dtype, p.V, v);
               for (int64_t j = 0; j < n; ++j)
                 step<F>(columns.weight(e[j].at), columns.write(e[j].at), columns.erase(e[j].at), padded, v);
               write_row<F>(v, p.V, p.out.dtype, row);
             });
           });
}

template <class F>
void backward(const SparseWriteBackward& b) {
  constexpr int W = kLanes<F>;
  const SparseWrite& p = b.forward;
  const Choice& c = p.choice;
  const int64_t batches = c.lead.batches(), all = c.tokens() * c.k;
  if (b.d_values) copy_rows(c.lead, c.N, p.V, b.d_out, b.d_values);
  Entries entries(c, p.token_mask);
  const int64_t stripe = most(W, round_up(div_up(p.V, kStripes), W)), stripes = div_up(p.V, stripe);
  const int64_t kept = div_up(entries.longest(batches), kSteps) + 1;
  Buffer<F> partial(b.d_weights ? batches * stripes * all : 0);
  const size_t bytes = size_t((kept + kSteps + 5) * stripe) * sizeof(F) + 8 * 64;
  parallel(batches * stripes, bytes, [&](int64_t task, char* memory) {
    FlushDenormals flush;
    Arena arena(memory);
    const int64_t batch = task / stripes, first = task % stripes * stripe, width = least(stripe, p.V - first);
    const int64_t padded = round_up(width, W);
    const Columns<F> columns(p, batch, first, width, arena);
    F *starts = arena.take<F>(kept * stripe), *past = arena.take<F>(kSteps * stripe), *g = arena.take<F>(stripe);
    F* da = partial.data() + task * all;
    const TokenRows d_write(b.d_write, c.lead, batch, c.T), d_erase(b.d_erase, c.lead, batch, c.T);
    for (int64_t t = 0; t < c.tokens(); ++t) {
      for (const TokenRows& d : {d_write, d_erase}) {
        if (d) std::memset(d.row(t) + first * int64_t(sizeof(F)), 0, size_t(width) * sizeof(F));
      }
    }
    if (b.d_weights && all > 0) std::memset(da, 0, size_t(all) * sizeof(F));
    const char* values = p.values.batch(c.lead, batch) + first * size_of(p.values.dtype);
    const char* d_out = b.d_out.batch(c.lead, batch) + first * size_of(b.d_out.dtype);
    auto one_slot = [&](int64_t slot, const Entry* e, int64_t n) {
      for (int64_t x = 0; x < padded; ++x) starts[x] = g[x] = 0;
      read_row<F>(values + slot * p.values.row, p.values.dtype, width, starts);
      read_row<F>(d_out + slot * b.d_out.row, b.d_out.dtype, width, g);
      const int64_t chunks = div_up(n, kSteps);
      for (int64_t s = 0; s + 1 < chunks; ++s) {
        F* v = starts + (s + 1) * stripe;
        std::memcpy(v, v - stripe, size_t(padded) * sizeof(F));
        for (int64_t j = s * kSteps; j < (s + 1) * kSteps; ++j) {
          step<F>(columns.weight(e[j].at), columns.write(e[j].at), columns.erase(e[j].at), padded, v);
        }
      }
      for (int64_t s = chunks; s-- > 0;) {
        F* v = starts + s * stripe;
        const int64_t j0 = s * kSteps, j1 = least(n, j0 + kSteps);
        for (int64_t j = j0; j < j1; ++j) {
          std::memcpy(past + (j - j0) * stripe, v, size_t(padded) * sizeof(F));
          step<F>(columns.weight(e[j].at), columns.write(e[j].at), columns.erase(e[j].at), padded, v);
        }
        for (int64_t j = j1; j-- > j0;) {
          const int64_t at = e[j].at, t = at / c.k;
          const F a = columns.weight(at), *w = columns.write(at), *erase = columns.erase(at);
          const F* before = past + (j - j0) * stripe;
          F* dw = d_write ? reinterpret_cast<F*>(d_write.row(t)) + first : nullptr;
          F* de = d_erase ? reinterpret_cast<F*>(d_erase.row(t)) + first : nullptr;
          for (int64_t x = 0; x < width && dw != nullptr; ++x) dw[x] += a * g[x];
          for (int64_t x = 0; x < width && de != nullptr; ++x) de[x] -= a * g[x] * before[x];
          Vec<F> total = fill<F>(0);
          for (int64_t x = 0; x < padded; x += W) {
            const Vec<F> gv = load<F>(g + x), ev = load<F>(erase + x);
            total += gv * (load<F>(w + x) - ev * load<F>(before + x));
            store<F>(g + x, gv - a * ev * gv);
          }
          if (b.d_weights) da[at] = sum<F>(total);
        }
      }
      if (!b.d_values) return;
      char* out = b.d_values.batch(c.lead, batch) + slot * b.d_values.row + first * size_of(b.d_values.dtype);
      write_row<F>(g, width, b.d_values.dtype, out);
    };
    for (int64_t part = 0; part < entries.parts(); ++part) entries.each_slot(batch, part, one_slot);
  });
  if (!b.d_weights) return;
  const int64_t step_tokens = most(1, 16384 / most(1, c.k)), blocks = div_up(c.tokens(), step_tokens);
  parallel(batches * blocks, size_t(c.k) * sizeof(F), [&](int64_t task, char* memory) {
    F* sum = reinterpret_cast<F*>(memory);
    const int64_t batch = task / blocks, t0 = task % blocks * step_tokens;
    const TokenRows rows(b.d_weights, c.lead, batch, c.T);
    for (int64_t t = t0; t < least(t0 + step_tokens, c.tokens()); ++t) {
      for (int64_t j = 0; j < c.k; ++j) sum[j] = 0;
      for (int64_t s = 0; s < stripes; ++s) {
        const F* part = partial.data() + (batch * stripes + s) * all + t * c.k;
        for (int64_t j = 0; j < c.k; ++j) sum[j] += part[j];
      }
      write_row<F>(sum, c.k, rows.dtype, rows.row(t));
    }
  });
}

}  // namespace

void sparse_write(const SparseWrite& p) {
  if (p.weights.dtype == DType::f64) forward<double>(p);
  else forward<float>(p);
}

void sparse_write_backward(const SparseWriteBackward& b) {
  if (b.forward.weights.dtype == DType::f64) backward<double>(b);
  else backward<float>(b);
}

}  // namespace mk::MK_ISA
