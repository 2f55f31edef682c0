// Shared by the writes: chunks of tokens that write, and blocks of slots with lanes of slots for the gates.
#pragma once

#include "cpu/tiles/gradient_rows.h"
#include "cpu/tiles/parallel.h"
#include "params/gated_write.h"

namespace mk::MK_ISA {

// Scores of few tokens of all batches, [batch][writing token][slot], mask and scale included. The slots of a block of
// kSlotBlock that may be addressed come first.
template <class F>
struct KeptScores {
  F* data = nullptr;
  int64_t tokens = 0, slots = 0;

  F* row(int64_t batch, int64_t t) const { return data + (batch * tokens + t) * slots; }
};

// The softmax rows of all tokens of all batches, [batches][folded T]. Rows of tokens that do not write are not written.
// With few tokens (few_tokens) their scores are kept.
void softmax_rows(const GatedWrite&, SoftmaxRow<float>*, const KeptScores<float>&);
void softmax_rows(const GatedWrite&, SoftmaxRow<double>*, const KeptScores<double>&);

constexpr int64_t kChunkTokens = 96;
template <class F>
constexpr int64_t kSlotTile = 256 / int64_t(sizeof(F));  // 64 float slots: four AVX-512 registers

// The tokens of [t0, t0 + count) that write, as rows of F. Others (token_mask) are left out.
template <class F>
struct TokenChunk {
  int64_t n = 0, t0 = 0;
  const F *query = nullptr, *write = nullptr, *erase = nullptr;
  int64_t qs = 0, ws = 0, es = 0;
  int32_t token[kChunkTokens];  // row j is token t0 + token[j]
};

template <class F>
class Tokens {
 public:
  struct Buffers {
    F *query, *write, *erase;
  };
  Tokens(const GatedWrite& p, int64_t batch)
      : K_(p.K),
        V_(p.V),
        query_(p.query, p.lead, batch, p.T),
        write_(p.write, p.lead, batch, p.T),
        erase_(p.erase, p.lead, batch, p.T),
        mask_(p.token_mask, p.lead, batch, p.T) {}

  static Buffers buffers(Arena& arena, const GatedWrite& p) {
    return {arena.take<F>(kChunkTokens * Slots<F>::padded(p.K)), arena.take<F>(kChunkTokens * Slots<F>::padded(p.V)),
            arena.take<F>(p.erase ? kChunkTokens * Slots<F>::padded(p.V) : 0)};
  }

  void load(int64_t t0, int64_t count, const Buffers& b, TokenChunk<F>& c) const {
    c.n = 0, c.t0 = t0;
    for (int64_t t = 0; t < count; ++t) {
      if (!mask_ || *mask_.row(t0 + t) != 0) c.token[c.n++] = int32_t(t);
    }
    const bool all = c.n == count;
    if (query_) fetch(query_, K_, t0, c, all, b.query, c.query, c.qs);
    if (write_) fetch(write_, V_, t0, c, all, b.write, c.write, c.ws);
    if (erase_) fetch(erase_, V_, t0, c, all, b.erase, c.erase, c.es);
  }

 private:
  static void fetch(const TokenRows& rows, int64_t width, int64_t t0, const TokenChunk<F>& c, bool all, F* buffer,
                    const F*& out, int64_t& stride) {
    if (all && rows.dtype == kOwn<F> && rows.folds == 0 && rows.stride % int64_t(sizeof(F)) == 0 &&
        width % kLanes<F> == 0) {
      out = reinterpret_cast<const F*>(rows.row(t0));
      stride = rows.stride / int64_t(sizeof(F));
      return;
    }
    stride = Slots<F>::padded(width);
    for (int64_t j = 0; j < c.n; ++j) {
      F* row = buffer + j * stride;
      read_row<F>(rows.row(t0 + c.token[j]), rows.dtype, width, row);
      for (int64_t x = width; x < stride; ++x) row[x] = 0;
    }
    out = buffer;
  }

  int64_t K_, V_;
  TokenRows query_, write_, erase_, mask_;
};

// The softmax rows of a call; empty for other gates.
template <class F>
class SoftmaxRows {
 public:
  explicit SoftmaxRows(const GatedWrite& p)
      : tokens_(p.gate == Gate::softmax ? p.lead.folded() * p.T : 0),
        rows_(p.lead.batches() * tokens_),
        scores_(few_tokens<F>(tokens_) ? p.lead.batches() * tokens_ * p.N : 0),
        kept_{scores_.data(), tokens_, p.N} {
    if (p.gate == Gate::softmax) softmax_rows(p, rows_.data(), kept_);
  }
  const SoftmaxRow<F>* data() { return rows_.data(); }
  const KeptScores<F>& kept() const { return kept_; }

 private:
  int64_t tokens_;
  Buffer<SoftmaxRow<F>> rows_;
  Buffer<F> scores_;
  KeptScores<F> kept_;
};

// Turns scores, or given weights, into the tiles that `open` reads.
template <class F>
class Gates {
 public:
  Gates(const GatedWrite& p, int64_t batch, const SoftmaxRow<F>* rows)
      : kind(p.gate),
        weights_(p.weights, p.lead, batch, p.T),
        rows_(rows == nullptr ? nullptr : rows + batch * p.lead.folded() * p.T) {}

  // S[t][j] = weight of slot first + j, zero in lanes beyond `count`.
  void copy(const TokenChunk<F>& c, int64_t first, int64_t count, int64_t lanes, F* S, int64_t ld) const {
    const int64_t item = size_of(weights_.dtype);
    for (int64_t t = 0; t < c.n; ++t) {
      F* s = S + t * ld;
      read_row<F>(weights_.row(c.t0 + c.token[t]) + first * item, weights_.dtype, count, s);
      for (int64_t j = count; j < lanes; ++j) s[j] = 0;
    }
  }
  // Turns scores (without `mask`, which may be null) into a softmax; lanes beyond the block get 0. A gate above 1/2 is
  // stored as a - 1, which is negative, since there 1 - a needs all its digits.
  void normalise(const TokenChunk<F>& c, int64_t first, const SlotBlock<F>& block, int64_t count, int64_t lanes,
                 const F* mask, F* S, int64_t ld) const {
    for (int64_t t = 0; t < c.n; ++t) {
      const SoftmaxRow<F>& row = rows_[c.t0 + c.token[t]];
      F* s = S + t * ld;
      for (int64_t l = 0; l < lanes; l += kLanes<F>) {
        const Vec<F> x = mask == nullptr ? load<F>(s + l) : load<F>(s + l) + load<F>(mask + l);
        store<F>(s + l, exp<F, 0>(x - row.top) * row.inverse);
      }
      for (int64_t j = block.n; j < lanes; ++j) s[j] = 0;
      if (row.slot < first || row.slot >= first + count || !(row.left < F(0.5))) continue;
      int64_t j = 0;
      while (block.place(j) != row.slot - first) ++j;
      s[j] = -row.left;
    }
  }
  // The softmax of scores that were kept.
  void recall(const TokenChunk<F>& c, const KeptScores<F>& scores, int64_t batch, int64_t first,
              const SlotBlock<F>& block, int64_t count, int64_t lanes, F* S, int64_t ld) const {
    for (int64_t t = 0; t < c.n; ++t) {
      F* s = S + t * ld;
      std::memcpy(s, scores.row(batch, t) + first, size_t(block.n) * sizeof(F));
      for (int64_t j = block.n; j < lanes; ++j) s[j] = 0;
    }
    normalise(c, first, block, count, lanes, nullptr, S, ld);
  }

  const Gate kind;

 private:
  TokenRows weights_;
  const SoftmaxRow<F>* rows_;
};

// a and 1 - a from a number of a tile; m is the mask of its slot.
template <class F>
MK_INLINE void open(Gate kind, Vec<F> x, Vec<F> m, Vec<F>& a, Vec<F>& keep) {
  if (kind == Gate::sigmoid) {
    sigmoid<F>(x + m, a, keep);
    return;
  }
  a = x, keep = F(1) - x;
  if (kind == Gate::given) return;
  const Ints<F> above = (Ints<F>)x < 0;  // by the sign bit, since -0 is a gate of exactly 1
  a = above ? F(1) + x : a;
  keep = above ? -x : keep;
}

// Keys of a block as lanes, times the scale, and its mask as lanes.
template <class F>
struct KeyLanes {
  int64_t L = 0;
  F *keys = nullptr, *mask = nullptr;

  KeyLanes(Arena& arena, int64_t K) : keys(arena.take<F>(K * kSlotTile<F>)), mask(arena.take<F>(kSlotTile<F>)) {}
  void pack(const SlotBlock<F>& block, int64_t K, F factor) {
    L = round_up(block.n, kLanes<F>);
    pack_lanes<F>(block.n, L, K, factor, nullptr, keys, [&](int64_t j, F*) { return block.keys + j * block.ks; });
    for (int64_t j = 0; j < L; ++j) mask[j] = block.mask != nullptr && j < block.n ? block.mask[j] : F(0);
  }
  // Computes the tile of `from` for this block, which covers `count` slots from `first` on.
  void gates(const Gates<F>& from, const TokenChunk<F>& c, int64_t first, int64_t count, const SlotBlock<F>& block,
             int64_t K, F* S) const {
    if (from.kind == Gate::given) {
      from.copy(c, first, block.n, L, S, L);
      return;
    }
    scores(c, K, S);
    if (from.kind == Gate::softmax) from.normalise(c, first, block, count, L, mask, S, L);
  }
  // S[t][lane], without the mask.
  void scores(const TokenChunk<F>& c, int64_t K, F* S) const {
    gemm(Gemm<F>{c.n, L, K, c.query, c.qs, 1, keys, L, S, L, false});
  }
};

// d_weights[token][first + j] = D[t][j]. Rows of tokens that do not write are not touched.
template <class F>
inline void write_weights(const TokenRows& weights, const TokenChunk<F>& c, int64_t first, int64_t slots, const F* D,
                          int64_t ld) {
  const int64_t item = size_of(weights.dtype);
  for (int64_t t = 0; t < c.n; ++t) {
    write_row<F>(D + t * ld, slots, weights.dtype, weights.row(c.t0 + c.token[t]) + first * item);
  }
}

// 1 - e a, the share of a slot's content that one token leaves. `keep` is 1 - a, computed without cancellation.
template <class F>
MK_INLINE Vec<F> left(Vec<F> a, Vec<F> keep, F e) {
  return e == F(1) ? keep : F(1) - e * a;
}

}  // namespace mk::MK_ISA
