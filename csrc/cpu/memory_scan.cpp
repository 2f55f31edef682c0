// memory_scan:  v_i <- v_i (1 - a[t, i]) + a[t, i] w_t,  r_t = sum_i p[t, i] v_i,  t = 1 .. T
//
// Keys do not change, so the scores of a chunk of tokens are two matrix products. Only v is a recurrence, in which
// neither slots nor columns depend on one another. Lanes are tokens while gates are computed, so that sums and maxima
// of the softmax over slots are element-wise. Then lanes are columns: six tokens pass over a slot while it is in
// registers, with their writes and reads in registers too. So a number of the memory is loaded once for six tokens and
// costs a product and two multiply-adds per token. The unrolled form with [token, token] weights has as many
// operations, and exponents that can overflow. A running maximum of the scores rescales the reads, so nothing grows
// with the number of slots.
//
// A single token has no lanes to fill: then lanes are slots for the gates, as in gated_write. Zen 4, B=32 N=64 K=V=64,
// two threads: 149 -> 55 us; the eager form takes 86.
//
// Batches run in parallel. With few batches, ranges of slots do, whose reads are merged in order by their maxima. Bound
// by multiply-adds.
#include "params/memory_scan.h"

#include <vector>

#include "cpu/tiles/online_softmax.h"
#include "cpu/tiles/scan_tiles.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t kFewBatches = 4;  // with fewer batches, slots are split into ranges
// Every range packs the queries for itself and has reads to merge. For a second thread that is worth it with few
// slots, for more threads with many. Zen 4, two threads, N=64, two ranges against one: T=2048 1060 -> 560 us, T=256
// 131 -> 83, T=64 44 -> 32; but N=256 T=2048, four ranges against two: 2150 -> 2400.
constexpr int64_t kLeastRange = 4 * kScanSlots;

template <class F>
struct Shape {
  int64_t batches, tokens, N, V, VP, range, ranges, panel;  // slots per range; tokens per panel
  bool direct;                                              // the result itself holds the memory while it changes

  explicit Shape(const GatedWrite& p)
      : batches(p.lead.batches()), tokens(p.lead.folded() * p.T), N(p.N), V(p.V), VP(Slots<F>::padded(p.V)) {
    const int64_t wanted = kFewBatches / most(batches, 1);
    ranges = most(1, most(least(wanted, N / kLeastRange), least(least(wanted, 2), N / kScanSlots)));
    range = round_up(div_up(N, ranges), kScanSlots);
    ranges = most(1, div_up(N, most(range, 1)));
    const int64_t fits = kPartialBytes / (most(batches * ranges * VP, 1) * int64_t(sizeof(F)));
    direct = p.out.dtype == kOwn<F> && p.out.data != p.values.data && VP == V && !p.mask &&
             p.out.row == V * int64_t(sizeof(F));
    panel = ranges == 1 ? tokens : most(1, fits / kChunkTokens) * kChunkTokens;
  }
};

// The softmax of one token over a range of slots: with p = e^(s - base), the sum of p and of p v. base is finite.
template <class F>
struct Sums {
  F *top, *total, *reads;  // [token], [token], [token][VP]
  Sums(Arena& arena, int64_t tokens, int64_t VP)
      : top(arena.take<F>(tokens)), total(arena.take<F>(tokens)), reads(arena.take<F>(tokens * VP)) {}
  Sums(const Sums& from, int64_t t, int64_t VP)
      : top(from.top + t), total(from.total + t), reads(from.reads + t * VP) {}
};

// What is subtracted from the scores: 0 if the maximum is infinite.
template <class F>
MK_INLINE Vec<F> base_of(Vec<F> top) {
  return top == kInf<F> || top == -kInf<F> ? fill<F>(0) : top;
}

// Turns scores S into p, [slot][token], and rescales earlier sums to the new maximum. `begun`: there are earlier reads.
template <class F>
void soften(const SlotBlock<F>& block, int64_t n, int64_t VP, bool begun, F* S, const Sums<F>& sums) {
  const int64_t L = scan_lanes<F>(n);
  for (int64_t l = 0; l < L; l += kLanes<F>) {
    const Vec<F> before = load<F>(sums.top + l);
    Vec<F> top = before;
    for (int64_t j = 0; j < block.n; ++j) top = max<F>(load<F>(S + j * L + l), top);
    const Vec<F> shrink = top == before ? fill<F>(1) : exp<F>(before - top), base = base_of<F>(top);
    Vec<F> total = fill<F>(0);
    for (int64_t j = 0; j < block.n; ++j) {
      const Vec<F> p = exp<F>(load<F>(S + j * L + l) - base);
      store<F>(S + j * L + l, p);
      total += p;
    }
    store<F>(sums.top + l, top), store<F>(sums.total + l, load<F>(sums.total + l) * shrink + total);
    if (!begun || !any<F>(shrink != F(1))) continue;
    for (int64_t t = l; t < least(l + kLanes<F>, n); ++t) {
      const F by = shrink[t - l];
      for (int64_t v = 0; v < VP; v += kLanes<F>)
        store<F>(sums.reads + t * VP + v, by * load<F>(sums.reads + t * VP + v));
    }
  }
}

template <class F>
class Range {
 public:
  Range(const MemoryScan& m, const Shape<F>& s, int64_t batch, int64_t range, F* values, Arena arena)
      : m_(m),
        p_(m.write),
        s_(s),
        batch_(batch),
        first_(range * s.range),
        end_(least(first_ + s.range, s.N)),
        values_(values),
        slots_(p_.keys, View{}, p_.mask, p_.lead, batch, p_.N, p_.K, 0, s.tokens == 1),
        writer_(p_, batch),
        reader_(reads_of(m), batch),
        buffers_(Slots<F>::buffers(arena, kScanSlots, p_.K, p_.V)),
        write_buffers_(Tokens<F>::buffers(arena, p_)),
        read_buffers_(Tokens<F>::buffers(arena, p_)),
        write_q_(arena.take<F>(p_.K * kChunkTokens)),
        read_q_(arena.take<F>(p_.K * kChunkTokens)),
        write_(arena.take<F>(kChunkTokens * s.VP)),
        gates_(arena.take<F>(3 * kScanSlots * kChunkTokens)),
        row_(arena.take<F>(s.VP)),
        own_(arena, kChunkTokens, s.VP) {}

  static size_t bytes(const MemoryScan& m, const Shape<F>& s) {
    const GatedWrite& p = m.write;
    Arena measure;
    Slots<F>::buffers(measure, kScanSlots, p.K, p.V);
    Tokens<F>::buffers(measure, p), Tokens<F>::buffers(measure, p);
    measure.take<F>((2 * p.K + 2 * s.VP + 3 * kScanSlots + 2) * kChunkTokens + s.VP);
    return measure.used() + 8 * 64;
  }

  void start() {
    const Slots<F> content(p_.keys, p_.values, p_.mask, p_.lead, batch_, p_.N, 0, p_.V, false);
    for_blocks([&](int64_t i, int64_t count) { take_values<F>(content.load(i, count, buffers_), p_.V, state(i)); });
  }
  // Tokens [t0, t1). If `out` is given, it receives the sums of token t at t - t0 and has room for whole chunks. If
  // not, the reads are finished here.
  void run(int64_t t0, int64_t t1, const Sums<F>* out) {
    for (int64_t t = t0; t < t1; t += kChunkTokens) {
      const int64_t count = least(kChunkTokens, t1 - t);
      const Sums<F> sums = out == nullptr ? own_ : Sums<F>(*out, t - t0, s_.VP);
      chunk(t, count, sums);
      if (out == nullptr) finish(m_, s_, batch_, t, count, &sums, 1, row_);
    }
  }
  void write_back() {
    if (s_.direct) return;
    const char* in = p_.values.batch(p_.lead, batch_);
    char* out = p_.out.batch(p_.lead, batch_);
    for_blocks([&](int64_t i, int64_t count) {
      const SlotBlock<F> block = slots_.load(i, count, buffers_);
      for (int64_t x = 0, j = 0; x < count; ++x) {
        const bool live = j < block.n && block.place(j) == x;
        if (!live) read_row<F>(in + (i + x) * p_.values.row, p_.values.dtype, p_.V, row_);  // an empty slot
        write_row<F>(live ? state(i) + j++ * s_.VP : row_, p_.V, p_.out.dtype, out + (i + x) * p_.out.row);
      }
    });
  }

  // Computes the reads of tokens [t0, t0 + count) from the sums of `ranges` ranges, which contain the active tokens
  // (token_mask).
  static void finish(const MemoryScan& m, const Shape<F>& s, int64_t batch, int64_t t0, int64_t count,
                     const Sums<F>* sums, int64_t ranges, F* row) {
    const GatedWrite& p = m.write;
    const TokenRows reads(m.reads, p.lead, batch, p.T), lses(m.lse, p.lead, batch, p.T),
        rests(m.lse_rest, p.lead, batch, p.T);
    const TokenRows mask(p.token_mask, p.lead, batch, p.T);
    for (int64_t t = t0, j = 0; t < t0 + count; ++t) {
      std::memset(row, 0, size_t(s.VP) * sizeof(F));
      LogSumExp<F> end;
      if (!mask || *mask.row(t) != 0) {
        F top = -kInf<F>, total = 0;
        for (int64_t g = 0; g < ranges; ++g) top = sums[g].top[j] > top ? sums[g].top[j] : top;
        for (int64_t g = 0; g < ranges; ++g) {
          const F share = sums[g].top[j] == top ? F(1) : F(std::exp(sums[g].top[j] - top));
          const F* part = sums[g].reads + j * s.VP;
          total += share * sums[g].total[j];
          for (int64_t v = 0; v < p.V; ++v) row[v] += share * part[v];
        }
        ++j;
        if (total != 0) {
          end = {std::isinf(top) ? F(0) : top, total};
          for (int64_t v = 0; v < p.V; ++v) row[v] /= total;
        }
      }
      write_row<F>(row, p.V, reads.dtype, reads.row(t));
      put_end(end, lses, rests, t);
    }
  }

 private:
  static GatedWrite reads_of(const MemoryScan& m) {
    GatedWrite p = m.write;
    p.query = m.read_query, p.write = View{};
    return p;
  }
  template <class Body>
  void for_blocks(Body&& body) {
    for (int64_t i = first_; i < end_; i += kScanSlots) body(i, least(kScanSlots, end_ - i));
  }
  F* state(int64_t slot) { return values_ + slot * s_.VP; }

  void chunk(int64_t t0, int64_t count, const Sums<F>& sums) {
    TokenChunk<F> c, r;
    writer_.load(t0, count, write_buffers_, c);
    reader_.load(t0, count, read_buffers_, r);
    if (c.n == 0) return;
    if (s_.tokens == 1) {
      one_token(c, r, sums);
      return;
    }
    const int64_t L = scan_lanes<F>(c.n);
    pack_chunk<F>(c, p_.K, p_.scale, write_q_);
    pack_chunk<F>(r, p_.K, p_.scale, read_q_);
    pad_rows<F>(c.write, c.ws, c.n, p_.V, write_);
    for (int64_t t = 0; t < L; ++t) sums.top[t] = -kInf<F>, sums.total[t] = 0;
    bool begun = false;
    F *a = gates_, *keep = a + kScanSlots * kChunkTokens, *p = keep + kScanSlots * kChunkTokens;
    for_blocks([&](int64_t i, int64_t width) {
      const SlotBlock<F> block = slots_.load(i, width, buffers_);
      scan_gates<F>(block, p_.K, write_q_, c.n, a, keep);
      score_columns<F>(block, p_.K, read_q_, L, p);
      if (block.n == 0) return;
      soften<F>(block, c.n, s_.VP, begun, p, sums);
      const ScanTile<F> tile{block.n, c.n, s_.VP, a, keep, p, write_, state(i), sums.reads, nullptr, !begun};
      begun = true;
      if (m_.read_first) scan_tile<F, Read::before>(tile);
      else scan_tile<F, Read::after>(tile);
    });
    if (!begun) std::memset(sums.reads, 0, size_t(round_up(c.n, kScanTokens) * s_.VP) * sizeof(F));
  }

  // Lanes are slots for the gates of the write, S[0], and the weights of the read, S[1].
  void one_token(const TokenChunk<F>& c, const TokenChunk<F>& r, const Sums<F>& sums) {
    constexpr int W = kLanes<F>;
    const int64_t KP = Slots<F>::padded(p_.K);
    for (int64_t x = 0; x < KP; ++x) {
      write_q_[x] = x < p_.K ? F(p_.scale) * c.query[x] : F(0);
      write_q_[KP + x] = x < p_.K ? F(p_.scale) * r.query[x] : F(0);
    }
    pad_rows<F>(c.write, c.ws, 1, p_.V, write_);
    std::memset(sums.reads, 0, size_t(s_.VP) * sizeof(F));
    F top = -kInf<F>, total = 0;
    F *a = gates_, *p = a + kSlotBlock, *keep = p + kSlotBlock;
    for_blocks([&](int64_t i, int64_t width) {
      const SlotBlock<F> block = slots_.load(i, width, buffers_);
      if (block.n == 0) return;
      score_rows<F>(block, p_.K, write_q_, 2, a);
      const int64_t L = round_up(block.n, W);
      Vec<F> tops = fill<F>(-kInf<F>), sum_p = fill<F>(0);
      for (int64_t l = 0; l < L; l += W) tops = max<F>(load<F>(p + l), tops);
      const F before = top, here = largest<F>(tops);
      top = here > top ? here : top;
      const Vec<F> base = base_of<F>(fill<F>(top));
      for (int64_t l = 0; l < L; l += W) {
        Vec<F> open, left;
        sigmoid<F>(load<F>(a + l), open, left);
        store<F>(a + l, open), store<F>(keep + l, left);
        const Vec<F> e = exp<F>(load<F>(p + l) - base);
        store<F>(p + l, e);
        sum_p += e;
      }
      const F shrink = top == before ? F(1) : exp<F>(fill<F>(before - top))[0];
      total = total * shrink + sum<F>(sum_p);
      int64_t x = 0;
      for (; x + 4 * W <= s_.VP; x += 4 * W) one_token_columns<4>(block.n, a, keep, p, x, shrink, state(i), sums.reads);
      for (; x < s_.VP; x += W) one_token_columns<1>(block.n, a, keep, p, x, shrink, state(i), sums.reads);
    });
    sums.top[0] = top, sums.total[0] = total;
  }

  // NV registers of columns of a block of slots: r <- shrink r, then for every slot v <- v keep + a w, r += p v.
  template <int NV>
  void one_token_columns(int64_t slots, const F* a, const F* keep, const F* p, int64_t x, F shrink, F* values,
                         F* reads) const {
    constexpr int W = kLanes<F>;
    Vec<F> w[NV], r[NV];
    for (int i = 0; i < NV; ++i) {
      w[i] = load<F>(write_ + x + i * W);
      r[i] = shrink * load<F>(reads + x + i * W);
    }
    for (int64_t j = 0; j < slots; ++j) {
      F* row = values + j * s_.VP + x;
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) {
        const Vec<F> v = load<F>(row + i * W), next = v * keep[j] + a[j] * w[i];
        r[i] += p[j] * (m_.read_first ? v : next);
        store<F>(row + i * W, next);
      }
    }
    for (int i = 0; i < NV; ++i) store<F>(reads + x + i * W, r[i]);
  }

  const MemoryScan& m_;
  const GatedWrite& p_;
  const Shape<F>& s_;
  int64_t batch_, first_, end_;
  F* values_;
  Slots<F> slots_;
  Tokens<F> writer_, reader_;
  typename Slots<F>::Buffers buffers_;
  typename Tokens<F>::Buffers write_buffers_, read_buffers_;
  F *write_q_, *read_q_, *write_, *gates_, *row_;
  Sums<F> own_;
};

template <class F>
void run(const MemoryScan& m) {
  const Shape<F> s(m.write);
  const size_t bytes = Range<F>::bytes(m, s);
  Buffer<F> values(s.direct ? 0 : s.batches * s.N * s.VP);  // the memory, in float for all tokens
  auto task_of = [&](int64_t task, char* memory) {
    const int64_t batch = task / s.ranges;
    F* own =
        s.direct ? reinterpret_cast<F*>(m.write.out.batch(m.write.lead, batch)) : values.data() + batch * s.N * s.VP;
    return Range<F>(m, s, batch, task % s.ranges, own, Arena(memory));
  };
  if (s.ranges == 1) {
    parallel(s.batches, bytes, [&](int64_t task, char* memory) {
      FlushDenormals flush;
      Range<F> range = task_of(task, memory);
      range.start();
      range.run(0, s.tokens, nullptr);
      range.write_back();
    });
    return;
  }
  const int64_t each = round_up(s.panel * (s.VP + 2) + 64, 16);
  Buffer<F> parts(s.batches * s.ranges * each);
  std::vector<Sums<F>> sums;
  for (int64_t task = 0; task < s.batches * s.ranges; ++task) {
    Arena arena(reinterpret_cast<char*>(parts.data() + task * each));
    sums.emplace_back(arena, s.panel, s.VP);
  }
  for (int64_t p0 = 0; p0 < most(s.tokens, 1); p0 += s.panel) {
    const int64_t p1 = least(p0 + s.panel, s.tokens), chunks = div_up(p1 - p0, kChunkTokens);
    parallel(s.batches * s.ranges, bytes, [&](int64_t task, char* memory) {
      FlushDenormals flush;
      Range<F> range = task_of(task, memory);
      if (p0 == 0) range.start();
      range.run(p0, p1, &sums[size_t(task)]);
      if (p1 == s.tokens) range.write_back();
    });
    parallel(s.batches * chunks, size_t(s.VP) * sizeof(F), [&](int64_t task, char* memory) {
      FlushDenormals flush;
      const int64_t batch = task / chunks, t = task % chunks * kChunkTokens;
      std::vector<Sums<F>> own;
      for (int64_t g = 0; g < s.ranges; ++g) own.emplace_back(sums[size_t(batch * s.ranges + g)], t, s.VP);
      Range<F>::finish(m, s, batch, p0 + t, least(kChunkTokens, p1 - p0 - t), own.data(), s.ranges,
                       reinterpret_cast<F*>(memory));
    });
  }
}

}  // namespace

void memory_scan(const MemoryScan& m) {
  if (m.read_query.dtype == DType::f64) run<double>(m);
  else run<float>(m);
}

}  // namespace mk::MK_ISA
