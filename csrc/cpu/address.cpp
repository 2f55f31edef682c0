// address:   w[t, i] = exp(s[t, i] - m_t) / sum_j exp(s[t, j] - m_t), m_t the largest score,  or  sigmoid(s[t, i])
//
// The tasks are (tile of tokens, chunk of slots). The scores of a task stay in L2 until their weights are known, so the
// T x N numbers of the result are written once. Only a memory of several chunks takes a second step, because its
// largest score is then known last: exponentials are rescaled where they lie, and weights in 16 bits, which would be
// rounded twice, are computed again from the scores. Outside of a token's range scores are -inf; blocks that no token
// of a tile may address are not loaded.
#include "params/address.h"

#include <algorithm>

#include "cpu/tiles/gather.h"
#include "cpu/tiles/pairs.h"
#include "cpu/tiles/ranges.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t kScoreBytes = 1 << 20;  // of the scores of a task
constexpr int64_t kTaskWork = 1 << 17;    // multiply-adds that pay for a task
constexpr int64_t kLeastTasks = 8;        // of a call that has work for so many, for load balance

struct Tasks {
  int64_t batches, tokens, tile, tiles;
  int64_t chunk, chunks;  // slots, in whole blocks
  bool few;               // lanes are slots, S[block][token][slot]; otherwise tokens, S[slot][token]

  template <class F>
  static Tasks of(const Address& p) {
    Tasks s;
    s.batches = p.lead.batches(), s.tokens = p.lead.folded() * p.T;
    s.few = few_tokens<F>(s.tokens);
    s.tile = s.few ? most(s.tokens, 1) : kTokenTile<F>;
    // A second step costs more where it computes scores again: then tiles are halved rather than slots split.
    const bool again = p.weights.dtype != kOwn<F>, fewer = s.batches * div_up(s.tokens, s.tile) < kLeastTasks;
    if (again && fewer && !s.few) s.tile = round_up(s.tile / 2, kLanes<F>);
    s.tiles = div_up(s.tokens, s.tile);
    const int64_t lanes = s.few ? s.tile : round_up(s.tile, kLanes<F>);
    const int64_t largest = round_up(kScoreBytes / (lanes * int64_t(sizeof(F))), kSlotBlock);
    const int64_t worth = round_up(div_up(kTaskWork, most(p.K, 1) * s.tile), kSlotBlock);
    const int64_t balanced = round_up(div_up(p.N, div_up(kLeastTasks, most(s.batches * s.tiles, 1))), kSlotBlock);
    s.chunk = again && !s.few ? largest : least(largest, most(worth, balanced));
    s.chunks = div_up(p.N, s.chunk);
    return s;
  }
};

// The largest score of each token of a task, and the sum of exponentials of scores minus it.
template <class F>
struct Ends {
  F *m, *l;
};

// The scores of one task, then their weights.
template <class F>
class Scores {
 public:
  Scores(const Address& p, const Tasks& s, int64_t task, Arena& arena)
      : p_(p),
        s_(s),
        chunk_(task % s.chunks),
        t0_(task / s.chunks % s.tiles * s.tile),
        batch_(task / s.chunks / s.tiles),
        n_(least(s.tile, s.tokens - t0_)),
        L_(s.few ? n_ : round_up(n_, kLanes<F>)),
        first_(chunk_ * s.chunk),
        count_(least(s.chunk, p.N - first_)),
        S_(arena.take<F>(s.chunk * lanes(s))),
        row_(arena.take<F>(kLanes<F> * most(kSlotBlock, Slots<F>::padded(p.K)))) {
    const Slots<F> slots(p.keys, View{}, p.mask, p.lead, batch_, p.N, p.K, 0, s.few);
    const TokenRows query(p.query, p.lead, batch_, p.T);
    const auto buffers = Slots<F>::buffers(arena, kSlotBlock, p.K, 0);
    F* q = arena.take<F>(lanes(s) * Slots<F>::padded(p.K));
    const ColumnScores<F> columns{query, slots, p.K, F(p.scale), are_pairs<F>(p.query.dtype, p.keys, p.K)};
    if (s.few) rows_query<F>(query, t0_, n_, p.K, F(p.scale), q);
    else columns.pack(t0_, n_, L_, row_, q);
    RowList<F> list = RowList<F>::take(arena, kSlotBlock);
    Span memory[kTokenTile<F>];
    const TileSpans spans(p.range, p.lead, batch_, p.T, p.N, t0_, n_, memory);
    for (int64_t i = 0; i < count_; i += kSlotBlock) {
      const int64_t count = least(kSlotBlock, count_ - i);
      F* S = S_ + i * L_;
      SlotBlock<F> block;
      if (!spans.meet(first_ + i, first_ + i + count)) {
        block.which = buffers.which;  // none of its slots
      } else if (!s.few) {
        block = columns.load(first_ + i, count, buffers);
        columns.scores(block, q, L_, S, {});
      } else if (as_stored(p, n_)) {
        block = slots.list(first_ + i, count, buffers);
        stored_scores(slots.stored_keys(), block, i, list, q, S);
      } else {
        block = slots.load(first_ + i, count, buffers);
        score_rows<F>(block, p.K, q, n_, S);
      }
      if (block.n > 0 && !spans.hold(first_ + i, first_ + i + count)) {
        if (s.few) close_rows<F>(spans, block, first_ + i, -kInf<F>, S);
        else close_columns<F>(spans, block, first_ + i, L_, -kInf<F>, S);
      }
      if (block.which != nullptr) spread(block, count, S);
    }
  }

  static size_t bytes(const Address& p, const Tasks& s) {
    Arena measure;
    Slots<F>::buffers(measure, kSlotBlock, p.K, 0);
    measure.take<F>(s.chunk * lanes(s));
    measure.take<F>(kLanes<F> * most(kSlotBlock, Slots<F>::padded(p.K)));
    measure.take<F>(lanes(s) * Slots<F>::padded(p.K));
    RowList<F>::take(measure, kSlotBlock);
    return measure.used();
  }
  static int64_t lanes(const Tasks& s) { return s.few ? s.tile : round_up(s.tile, kLanes<F>); }

  void open_sigmoids() {
    Vec<F> keep;
    each_vector([&](int64_t, F* s) {
      Vec<F> x = load<F>(s);
      sigmoid<F>(x, x, keep);
      store<F>(s, x);
    });
  }

  // e^(s - m), with m the largest score of each token in this task.
  void exponentiate(const Ends<F>& ends) {
    constexpr int W = kLanes<F>;
    if (!s_.few) {
      for (int64_t l = 0; l < L_; l += W) {
        const F* s = S_ + l;
        const auto pair = [&](int64_t i) { return max<F>(load<F>(s + i * L_), load<F>(s + (i + 1) * L_)); };
        Vec<F> m = fill<F>(-kInf<F>);
        int64_t i = 0;
        for (; i + 4 <= count_; i += 4) m = max<F>(max<F>(pair(i), pair(i + 2)), m);  // a short chain of dependences
        for (; i < count_; ++i) m = max<F>(load<F>(s + i * L_), m);
        store<F>(ends.m + l, m);
        store<F>(ends.l + l, exponentials(m, S_ + l, count_, L_));
      }
      return;
    }
    for (int64_t t = 0; t < n_; ++t) {
      Vec<F> tops = fill<F>(-kInf<F>), l = fill<F>(0);
      each_block([&](int64_t i, int64_t lanes) {
        for (int64_t c = 0; c < lanes; c += W) tops = max<F>(load<F>(S_ + i * L_ + t * kSlotBlock + c), tops);
      });
      const F m = largest<F>(tops);
      each_block(
          [&](int64_t i, int64_t lanes) { l += exponentials(fill<F>(m), S_ + i * L_ + t * kSlotBlock, lanes / W, W); });
      ends.m[t] = m, ends.l[t] = sum<F>(l);
    }
  }

  // The same with m known.
  void exponentiate_from(const F* m) {
    each_vector([&](int64_t t, F* s) {
      const Vec<F> top = s_.few ? fill<F>(m[t]) : load<F>(m + t);
      store<F>(s, exp<F>(load<F>(s) - (top == -kInf<F> ? fill<F>(0) : top)));
    });
  }

  // weights[t][i] = factor[t] * S.
  void write(const F* factor) const {
    constexpr int W = kLanes<F>;
    const TokenRows weights(p_.weights, p_.lead, batch_, p_.T);
    const int64_t item = size_of(p_.weights.dtype);
    const auto at = [&](int64_t t, int64_t i) { return weights.row(t0_ + t) + (first_ + i) * item; };
    for (int64_t t = 0; t < n_ && s_.few; ++t) {
      const Vec<F> by = fill<F>(factor[t]);
      each_block([&](int64_t i, int64_t lanes) {
        const F* s = S_ + i * L_ + t * kSlotBlock;
        for (int64_t c = 0; c < lanes; c += W) store<F>(row_ + c, by * load<F>(s + c));
        write_row<F>(row_, least(kSlotBlock, count_ - i), p_.weights.dtype, at(t, i));
      });
    }
    for (int64_t l = 0; l < n_ && !s_.few; l += W) {
      const Vec<F> by = load<F>(factor + l);
      const int64_t live = least(W, n_ - l);
      for (int64_t i = 0; i < count_; i += kSlotBlock) {
        const int64_t count = least(kSlotBlock, count_ - i);
        scaled_rows(S_ + i * L_ + l, count, by);
        for (int64_t t = 0; t < live; ++t) {
          write_row<F>(row_ + t * kSlotBlock, count, p_.weights.dtype, at(l + t, i));
        }
      }
    }
    for (int64_t t = 0; t < n_; ++t) {
      if (std::isnan(factor[t])) zero_closed(p_, batch_, t0_ + t, first_, count_);
    }
  }

  // Zeroes the weights of slots that token t may not address, where that of another is NaN: 0 * NaN is NaN.
  static void zero_closed(const Address& p, int64_t batch, int64_t t, int64_t first, int64_t count) {
    Span own{0, p.N};
    const TileSpans spans(p.range, p.lead, batch, p.T, p.N, t, 1, &own);
    const SlotMask<F> mask(p.mask, p.lead, batch);
    const int64_t item = size_of(p.weights.dtype);
    char* row = TokenRows(p.weights, p.lead, batch, p.T).row(t);
    for (int64_t i = first; i < first + count; ++i) {
      if (!own.holds(i, i + 1) || mask.at(i) == -kInf<F>) std::memset(row + i * item, 0, size_t(item));
    }
  }

  // Multiplies weights that lie in the result.
  static void rescale(const Address& p, const Tasks& s, int64_t task, const F* factor) {
    constexpr int W = kLanes<F>;
    const int64_t first = task % s.chunks * s.chunk, t0 = task / s.chunks % s.tiles * s.tile;
    const TokenRows weights(p.weights, p.lead, task / s.chunks / s.tiles, p.T);
    const int64_t n = least(s.tile, s.tokens - t0), count = least(s.chunk, p.N - first);
    for (int64_t t = 0; t < n; ++t) {
      F* row = reinterpret_cast<F*>(weights.row(t0 + t)) + first;
      int64_t i = 0;
      for (; i + W <= count; i += W) store<F>(row + i, factor[t] * load<F>(row + i));
      for (; i < count; ++i) row[i] *= factor[t];
      if (std::isnan(factor[t])) zero_closed(p, task / s.chunks / s.tiles, t0 + t, first, count);
    }
  }

 private:
  // Are keys converted in registers, again for every token? As in softmax_read, for one token or two.
  static bool as_stored(const Address& p, int64_t tokens) { return tokens <= 2 && p.keys.dtype != kOwn<F>; }
  // Scores of keys in their stored dtype, padded to whole registers with -inf.
  void stored_scores(const typename Slots<F>::Source& keys, const SlotBlock<F>& block, int64_t i, RowList<F>& list,
                     const F* q, F* S) const {
    for (int64_t j = 0; j < block.n + kAhead; ++j) {
      const int64_t slot = j < block.n ? i + block.place(j) : least(i + kSlotBlock + j - block.n, count_ - 1);
      list.rows[j] = keys.row(first_ + slot);
    }
    for (int64_t t = 0; t < n_; ++t, q += Slots<F>::padded(p_.K), S += kSlotBlock) {
      row_products(keys.dtype, list.rows, block.n, p_.K, q, S);
      for (int64_t j = 0; j < block.n && block.mask != nullptr; ++j) S[j] += block.mask[j];
      for (int64_t j = block.n; j < round_up(block.n, kLanes<F>); ++j) S[j] = -kInf<F>;
    }
  }
  // Calls body(i, lanes) for the blocks of few tokens: slots from i on, padded to so many lanes.
  template <class Body>
  void each_block(Body&& body) const {
    for (int64_t i = 0; i < count_; i += kSlotBlock) body(i, round_up(least(kSlotBlock, count_ - i), kLanes<F>));
  }
  // Calls body(t, s) for each register of scores: of token t, or of tokens from t on.
  template <class Body>
  void each_vector(Body&& body) {
    constexpr int W = kLanes<F>;
    if (!s_.few) {
      for (int64_t i = 0; i < count_; ++i) {
        for (int64_t l = 0; l < L_; l += W) body(l, S_ + i * L_ + l);
      }
      return;
    }
    for (int64_t t = 0; t < n_; ++t) {
      each_block([&](int64_t i, int64_t lanes) {
        for (int64_t c = 0; c < lanes; c += W) body(t, S_ + i * L_ + t * kSlotBlock + c);
      });
    }
  }
  static Vec<F> exponentials(Vec<F> m, F* s, int64_t count, int64_t stride) {
    const Vec<F> base = m == -kInf<F> ? fill<F>(0) : m;
    Vec<F> l = fill<F>(0);
    for (int64_t i = 0; i < count; ++i) {
      const Vec<F> e = exp<F>(load<F>(s + i * stride) - base);
      l += e;
      store<F>(s + i * stride, e);
    }
    return l;
  }
  // row_[t][i] = by[t] * S[i][t] for a register of tokens.
  void scaled_rows(const F* S, int64_t count, Vec<F> by) const {
    constexpr int W = kLanes<F>;
    for (int64_t c = 0; c < count; c += W) {
      Vec<F> x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) x[i] = by * load<F>(S + least(c + i, count - 1) * L_);
      transpose<F>(x);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store<F>(row_ + i * kSlotBlock + c, x[i]);
    }
  }
  // Moves the scores of the slots that may be addressed to their places, with -inf between them; from the last on, so
  // that no score is overwritten before it has moved.
  void spread(const SlotBlock<F>& block, int64_t count, F* S) const {
    if (!s_.few) {
      int64_t j = block.n;
      for (int64_t c = count; c-- > 0;) {
        if (j > 0 && block.which[j - 1] == c) {
          --j;
          if (j != c) std::memcpy(S + c * L_, S + j * L_, size_t(L_) * sizeof(F));
        } else {
          std::fill_n(S + c * L_, L_, -kInf<F>);
        }
      }
      return;
    }
    for (int64_t t = 0; t < n_; ++t, S += kSlotBlock) {
      int64_t j = block.n;
      for (int64_t c = round_up(count, kLanes<F>); c-- > 0;) {
        S[c] = j > 0 && block.which[j - 1] == c ? S[--j] : -kInf<F>;
      }
    }
  }

  const Address& p_;
  const Tasks& s_;
  int64_t chunk_, t0_, batch_, n_, L_, first_, count_;
  F *S_, *row_;
};

// What the exponentials of a task are multiplied by. `m`, `l`: of all slots. Beside an infinite score, finite scores
// have weight 0, and its own weight is NaN already.
template <class F>
F factor_of(F m, F l, F own) {
  if (m == kInf<F>) return own == m ? F(1) : F(0);
  if (l == 0) return 0;
  return (own == m ? F(1) : own == -kInf<F> ? F(0) : std::exp(own - m)) / l;
}

// m, l of all chunks, from those of each: tasks [tiles][chunks], 2 * lanes numbers each.
template <class F>
Ends<F> merged(const F* parts, const Tasks& s, int64_t size, Arena& arena) {
  const int64_t lanes = size / 2;
  Ends<F> all{arena.take<F>(lanes), arena.take<F>(lanes)};
  for (int64_t t = 0; t < lanes; ++t) {
    F m = -kInf<F>, l = 0;
    for (int64_t c = 0; c < s.chunks; ++c) m = parts[c * size + t] > m ? parts[c * size + t] : m;
    for (int64_t c = 0; c < s.chunks; ++c) {
      const F own = parts[c * size + t], sum = parts[c * size + lanes + t];
      if (sum != 0) l += own == m || own == -kInf<F> ? sum : sum * std::exp(own - m);
    }
    all.m[t] = m, all.l[t] = l;
  }
  return all;
}

template <class F>
void run(const Address& p) {
  const Tasks s = Tasks::of<F>(p);
  const int64_t lanes = round_up(Scores<F>::lanes(s), kLanes<F>), size = 2 * lanes;
  const int64_t tasks = s.batches * s.tiles * s.chunks;
  const bool whole = p.sigmoid || s.chunks == 1, again = !whole && p.weights.dtype != kOwn<F>;
  Buffer<F> parts(whole ? 0 : tasks * size);
  const size_t scratch = Scores<F>::bytes(p, s) + size_t(4 * lanes) * sizeof(F) + 8 * 64;

  parallel(tasks, scratch, [&](int64_t task, char* memory) {
    FlushDenormals flush;
    Arena arena(memory);
    F* factor = arena.take<F>(lanes);
    std::fill_n(factor, lanes, F(1));
    Scores<F> scores(p, s, task, arena);
    if (p.sigmoid) {
      scores.open_sigmoids();
    } else {
      F* part = whole ? arena.take<F>(size) : parts.data() + task * size;
      const Ends<F> ends{part, part + lanes};
      std::fill_n(part, lanes, -kInf<F>), std::fill_n(part + lanes, lanes, F(0));
      scores.exponentiate(ends);
      for (int64_t t = 0; whole && t < lanes; ++t) factor[t] = factor_of(ends.m[t], ends.l[t], ends.m[t]);
    }
    if (!again) scores.write(factor);
  });
  if (whole) return;
  parallel(tasks, scratch, [&](int64_t task, char* memory) {
    FlushDenormals flush;
    Arena arena(memory);
    F* factor = arena.take<F>(lanes);
    const F* own = parts.data() + task * size;
    const Ends<F> all = merged<F>(parts.data() + task / s.chunks * s.chunks * size, s, size, arena);
    for (int64_t t = 0; t < lanes; ++t) factor[t] = factor_of(all.m[t], all.l[t], own[t]);
    if (!again) return Scores<F>::rescale(p, s, task, factor);
    Scores<F> scores(p, s, task, arena);
    scores.exponentiate_from(own);
    scores.write(factor);
  });
}

}  // namespace

void address(const Address& p) {
  if (p.query.dtype == DType::f64) run<double>(p);
  else run<float>(p);
}

}  // namespace mk::MK_ISA
