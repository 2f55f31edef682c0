// Gradients of memory from the tokens that chose it:
//   out[i] = factor * sum over (t, j) with index[t, j] = i of weight[t, j] row_t
//
// The entries (t, j) are sorted by slot with a stable sort, so that every slot is summed in the order of the tokens:
// the same bits on every run and for any number of threads, without atomics. The sort has two counting passes. The
// first sorts by the high bits of the slot into buckets (two passes over the indices, in chunks of tokens). The second
// sorts every bucket by the low bits, in the cache of the thread that sums it. Each bucket is a range of rows of the
// result. Its thread writes them from first to last, including zeros between the chosen rows if the result is not zero
// yet, so nothing is written twice. Bound by the bandwidth of the result.
#include "cpu/tiles/segments.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t kTermsAtOnce = 256;  // of entries that have several

// Entries in order of bucket, then position: position << shift | row within the bucket.
struct Buckets {
  int64_t rows, count, most_entries = 0;
  int shift = 3;
  Buffer<uint64_t> entries;
  Buffer<int64_t> starts;  // [count + 1]

  Buckets(const Choice& c, const MemoryGradient& like)
      : rows(like.rows), count(0), entries(c.all_tokens() * c.k), starts(kMost + 1) {
    while (div_up(rows, int64_t(1) << shift) > kMost) ++shift;
    count = div_up(rows, int64_t(1) << shift);
    const int64_t all = c.all_tokens(), tokens = c.tokens();
    const int64_t chunk = most(div_up(all, kChunks), most(1, 8192 / most(c.k, 1)));
    const int64_t chunks = div_up(all, chunk);
    Buffer<int64_t> places(chunks * count);
    const View& v = like.view;
    const int64_t group = most(1, c.N * v.row);
    auto each = [&](int64_t task, auto&& body) {
      const int64_t end = least(all, (task + 1) * chunk);
      for (int64_t t = task * chunk; t < end; ++t) {
        const int64_t batch = t / tokens;
        const int64_t first = (v.batch(c.lead, batch) - v.data) / group * c.N;
        const auto* index = reinterpret_cast<const int64_t*>(TokenRows(c.indices, c.lead, batch, c.T).row(t % tokens));
        for (int64_t j = 0; j < c.k; ++j) {
          if (index[j] >= 0) body(first + index[j], t * c.k + j);
        }
      }
    };
    parallel(chunks, 0, [&](int64_t task, char*) {
      int64_t* n = places.data() + task * count;
      std::memset(n, 0, size_t(count) * sizeof(int64_t));
      each(task, [&](int64_t row, int64_t) { ++n[row >> shift]; });
    });
    int64_t at = 0;
    for (int64_t b = 0; b < count; ++b) {
      starts.data()[b] = at;
      for (int64_t i = 0; i < chunks; ++i) {
        const int64_t n = places.data()[i * count + b];
        places.data()[i * count + b] = at;
        at += n;
      }
      most_entries = most(most_entries, at - starts.data()[b]);
    }
    starts.data()[count] = at;
    parallel(chunks, 0, [&](int64_t task, char*) {
      int64_t* place = places.data() + task * count;
      const uint64_t low = (uint64_t(1) << shift) - 1;
      each(task, [&](int64_t row, int64_t position) {
        entries.data()[place[row >> shift]++] = uint64_t(position) << shift | (uint64_t(row) & low);
      });
    });
  }

 private:
  static constexpr int64_t kMost = 1024, kChunks = 64;
};

// One bucket, its entries ordered by row and position: those of row r are positions[starts[r] .. starts[r + 1]).
struct Bucket {
  int64_t first, n;
  int64_t *starts, *positions;

  static Bucket take(Arena& arena, const Buckets& all) {
    return {0, 0, arena.take<int64_t>((int64_t(1) << all.shift) + 2), arena.take<int64_t>(all.most_entries)};
  }
  void sort(Buckets& all, int64_t b) {
    first = b << all.shift;
    n = least(int64_t(1) << all.shift, all.rows - first);
    const uint64_t* begin = all.entries.data() + all.starts.data()[b];
    const uint64_t* end = all.entries.data() + all.starts.data()[b + 1];
    const uint64_t low = (uint64_t(1) << all.shift) - 1;
    // Counts are stored two places further on. After the prefix sum they are one place further on, and placing the
    // entries moves them to their own place.
    std::memset(starts, 0, size_t(n + 2) * sizeof(int64_t));
    for (const uint64_t* e = begin; e < end; ++e) ++starts[(*e & low) + 2];
    for (int64_t r = 2; r < n + 2; ++r) starts[r] += starts[r - 1];
    for (const uint64_t* e = begin; e < end; ++e) positions[starts[(*e & low) + 1]++] = int64_t(*e >> all.shift);
  }
};

// sum = the terms of entries that have several, some hundred terms at a time.
template <class F>
void sum_terms(const Sum<F>& s, const int64_t* positions, int64_t n, RowList<F> list, F* sum, F* scratch) {
  F* part = scratch + s.terms->scratch;
  std::fill_n(sum, s.width, F(0));
  for (int64_t e = 0; e < n;) {
    list.n = 0;
    do s.terms->add(positions[e], list, scratch);
    while (++e < n && list.n + s.terms->most <= kTermsAtOnce);
    list.close();
    weighted_sum(s.dtype, list.rows, list.weights, list.n, s.width, part);
    for (int64_t c = 0; c < s.width; ++c) sum[c] += part[c];
  }
}

template <class F>
void sum_bucket(const Bucket& bucket, int64_t k, const Sum<F>& s, RowList<F> list, F* sum, F* scratch) {
  const int64_t item = size_of(s.out.view.dtype), bytes = s.width * item;
  char* out = s.out.view.data + bucket.first * bytes;
  const int64_t total = bucket.starts[bucket.n];
  for (int64_t e = 0; s.rows != nullptr && e < total; ++e) {
    list.push(s.rows[bucket.positions[e] / k], s.weights[bucket.positions[e]]);
  }
  list.close();
  int64_t clear = 0;  // all rows before it have been written
  auto clear_until = [&](int64_t r) {
    if (!s.out.zero) std::memset(out + clear * bytes, 0, size_t((r - clear) * bytes));
    clear = r + 1;
  };
  for (int64_t r = 0; r < bucket.n; ++r) {
    const int64_t begin = bucket.starts[r], n = bucket.starts[r + 1] - begin;
    if (n == 0) continue;
    clear_until(r);
    if (s.terms != nullptr) {
      sum_terms(s, bucket.positions + begin, n, list, sum, scratch);
    } else if (s.rows != nullptr) {
      weighted_sum(s.dtype, list.rows + begin, list.weights + begin, n, s.width, sum);
    } else {
      *sum = 0;
      for (int64_t e = begin; e < begin + n;) {  // a sum in two levels, as in weighted_sum
        F part = 0;
        for (const int64_t end = least(begin + n, e + kTerms); e < end; ++e) part += s.weights[bucket.positions[e]];
        *sum += part;
      }
    }
    if (s.factor != 1) {
      for (int64_t c = 0; c < s.width; ++c) sum[c] *= s.factor;
    }
    write_row<F>(sum, s.width, s.out.view.dtype, out + r * bytes);
  }
  clear_until(bucket.n);
}

// Are both gradients broadcast over the same leading dimensions? Then their entries have the same order.
bool same_rows(const Lead& lead, const MemoryGradient& a, const MemoryGradient& b) {
  bool same = a.rows == b.rows;
  for (int d = 0; d < lead.rank; ++d) same &= lead.shared[d] || (a.view.lead[d] == 0) == (b.view.lead[d] == 0);
  return same;
}

template <class F>
void sum_all(const Choice& c, const Sum<F>* sums, int count) {
  bool done[8] = {};
  for (int i = 0; i < count; ++i) {
    if (done[i] || !sums[i].out || sums[i].width * sums[i].out.rows == 0) continue;
    Buckets buckets(c, sums[i].out);
    int64_t width = 0, terms = buckets.most_entries, scratch = 0;
    const Sum<F>* group[8];
    int n = 0;
    for (int j = i; j < count; ++j) {
      if (!sums[j].out || sums[j].width == 0 || !same_rows(c.lead, sums[i].out, sums[j].out)) continue;
      done[j] = true;
      width = most(width, round_up(sums[j].width, kLanes<F>));
      group[n++] = sums + j;
      if (sums[j].terms == nullptr) continue;
      terms = most(terms, most(sums[j].terms->most, kTermsAtOnce));
      scratch = most(scratch, sums[j].terms->scratch + round_up(sums[j].width, kLanes<F>));
    }
    auto lay = [&](Arena& arena, Bucket& bucket, RowList<F>& list, F*& sum, F*& own) {
      bucket = Bucket::take(arena, buckets);
      list = RowList<F>::take(arena, terms);
      sum = arena.take<F>(width);
      own = arena.take<F>(scratch);
    };
    Bucket bucket;
    RowList<F> list;
    F *sum, *nowhere;
    Arena measure;
    lay(measure, bucket, list, sum, nowhere);
    parallel(buckets.count, measure.used(), [&](int64_t task, char* memory) {
      Bucket own;
      RowList<F> rows;
      F *row, *room;
      Arena arena(memory);
      lay(arena, own, rows, row, room);
      own.sort(buckets, task);
      for (int j = 0; j < n; ++j) sum_bucket<F>(own, c.k, *group[j], rows, row, room);
    });
  }
}

}  // namespace

void sum_chosen(const Choice& c, const Sum<float>* sums, int count) { sum_all(c, sums, count); }
void sum_chosen(const Choice& c, const Sum<double>* sums, int count) { sum_all(c, sums, count); }

}  // namespace mk::MK_ISA
