// The first pass of softmax_write: the softmax of every token. gated_write does the write itself.
//
//   top_t = max_i s[t, i],   left_t = rest_t / (1 + rest_t),
//   rest_t = sum of e^(s[t, i] - top_t) over all slots but the first at top
//
// The largest slot is left out of the sum, so that 1 - a of a gate near 1 is a sum of small numbers; 1 - 1 / (1 + rest)
// would cancel. Lanes are slots. A tile of scores is compared with the token's running maximum, which rarely changes.
// Parallel over batches, chunks of tokens and ranges of slots, whose numbers depend on shapes only; ranges merge in
// order. Bound by the product, T N K multiply-adds. Of few tokens, which are bound by reading the keys, the scores are
// kept for the write: at most half a register of numbers per slot.
#include "cpu/tiles/write_tiles.h"

namespace mk::MK_ISA {
namespace {

// One token over the slots seen so far.
template <class F>
struct Seen {
  F top = -kInf<F>, rest = 0;
  int64_t slot = -1;

  // Rescales `rest` from a lower maximum to a higher one. A maximum of -inf stands for no slot at all.
  static F lowered(F rest, F from, F to) {
    const F factor = exp<F>(fill<F>(from - to))[0];
    return from == -kInf<F> ? rest : factor * (rest + 1);
  }
  void merge(const Seen& other) {
    if (other.top > top) {
      rest = other.rest + lowered(rest, top, other.top);
      top = other.top, slot = other.slot;
    } else {
      rest += lowered(other.rest, other.top, top);
    }
  }
  SoftmaxRow<F> row() const {
    if (top == kInf<F>) return {top, 0, 0, -1};  // as in PyTorch: NaN where the score is infinite, 0 elsewhere
    if (rest != rest) return {0, rest, rest, -1};
    if (top == -kInf<F>) return {0, 0, 0, -1};
    return {top, 1 / (1 + rest), rest / (1 + rest), slot};
  }
};

// Adds a row of scores to one token. `S` is scratch afterwards; its lanes past the block hold -inf.
template <class F>
void add_row(F* S, int64_t lanes, const SlotBlock<F>& block, int64_t first, Seen<F>& seen) {
  constexpr int W = kLanes<F>;
  Vec<F> most = fill<F>(-kInf<F>);
  for (int64_t l = 0; l < lanes; l += W) most = max<F>(load<F>(S + l), most);
  Seen<F> here;
  if (any<F>(most > seen.top)) {
    here.top = largest<F>(most);
    int64_t j = 0;
    while (S[j] != here.top) ++j;
    here.slot = first + block.place(j);
    S[j] = -kInf<F>;
    seen.merge(here);
  }
  const F base = seen.top == -kInf<F> ? F(0) : seen.top;
  Vec<F> rest = fill<F>(0);
  for (int64_t l = 0; l < lanes; l += W) rest += exp<F>(load<F>(S + l) - base);
  seen.rest += sum<F>(rest);
}

// scores: null, or of few tokens where they are kept for the write.
template <class F>
void run(const GatedWrite& p, SoftmaxRow<F>* rows, const KeptScores<F>& scores) {
  constexpr int W = kLanes<F>;
  constexpr int64_t kRangeSlots = 1024, kTasks = 64;
  const int64_t batches = p.lead.batches(), tokens = p.lead.folded() * p.T, chunks = div_up(tokens, kChunkTokens);
  if (batches * tokens == 0) return;
  const int64_t ranges = most(1, least(div_up(p.N, kRangeSlots), div_up(kTasks, batches * chunks)));
  const bool few = few_tokens<F>(tokens);
  const int64_t range = round_up(div_up(p.N, ranges), few ? kSlotBlock : kSlotTile<F>);
  const int64_t size = few ? kSlotBlock : kSlotTile<F>, KP = Slots<F>::padded(p.K);
  Buffer<Seen<F>> seen(batches * tokens * ranges);
  Arena measure;
  Slots<F>::buffers(measure, size, p.K, 0);
  Tokens<F>::buffers(measure, p);
  measure.take<F>((KP + 1) * kSlotTile<F> + kChunkTokens * size + (few ? W * KP : 0));
  GatedWrite source = p;  // only addresses are used; nothing that the call writes is read
  source.write = source.erase = View{};
  parallel(batches * chunks * ranges, measure.used() + 12 * 64, [&](int64_t task, char* memory) {
    FlushDenormals flush;
    const int64_t batch = task / (chunks * ranges), c = task / ranges % chunks, r = task % ranges;
    Arena arena(memory);
    const Slots<F> slots(p.keys, View{}, p.mask, p.lead, batch, p.N, p.K, 0, few);
    const auto buffers = Slots<F>::buffers(arena, size, p.K, 0);
    const auto token_buffers = Tokens<F>::buffers(arena, p);
    KeyLanes<F> lanes(arena, p.K);
    F* S = arena.take<F>(kChunkTokens * size);
    F* q = arena.take<F>(few ? W * KP : 0);
    TokenChunk<F> chunk;
    Tokens<F>(source, batch)
        .load(c * kChunkTokens, least(kChunkTokens, tokens - c * kChunkTokens), token_buffers, chunk);
    Seen<F> own[kChunkTokens];
    for (int64_t t = 0; t < chunk.n && few; ++t) {
      for (int64_t x = 0; x < KP; ++x) {
        q[t * KP + x] = x < p.K ? F(p.scale) * chunk.query[t * chunk.qs + x] : F(0);
      }
    }
    for (int64_t i = r * range; i < least((r + 1) * range, p.N); i += size) {
      const SlotBlock<F> block = slots.load(i, least(size, least((r + 1) * range, p.N) - i), buffers);
      if (block.n == 0) continue;
      const int64_t L = round_up(block.n, W), ld = few ? kSlotBlock : L;
      if (few) {
        score_rows<F>(block, p.K, q, chunk.n, S);
      } else {
        lanes.pack(block, p.K, F(p.scale));
        lanes.scores(chunk, p.K, S);
      }
      for (int64_t t = 0; t < chunk.n; ++t) {
        F* s = S + t * ld;
        for (int64_t l = 0; l < L && !few; l += W) store<F>(s + l, load<F>(s + l) + load<F>(lanes.mask + l));
        for (int64_t j = block.n; j < L; ++j) s[j] = -kInf<F>;
        if (few) std::memcpy(scores.row(batch, t) + i, s, size_t(block.n) * sizeof(F));
        add_row<F>(s, L, block, i, own[t]);
      }
    }
    for (int64_t t = 0; t < chunk.n; ++t) {
      seen.data()[(batch * tokens + chunk.t0 + chunk.token[t]) * ranges + r] = own[t];
    }
  });
  const auto merge = [&](int64_t task, char*) {
    const int64_t batch = task / chunks, t0 = task % chunks * kChunkTokens;
    const TokenRows mask(p.token_mask, p.lead, batch, p.T);
    for (int64_t t = t0; t < least(t0 + kChunkTokens, tokens); ++t) {
      if (mask && *mask.row(t) == 0) continue;
      const Seen<F>* parts = seen.data() + (batch * tokens + t) * ranges;
      Seen<F> whole = parts[0];
      for (int64_t r = 1; r < ranges; ++r) whole.merge(parts[r]);
      rows[batch * tokens + t] = whole.row();
    }
  };
  if (few) {  // too little for another thread to be woken
    for (int64_t task = 0; task < batches * chunks; ++task) merge(task, nullptr);
  } else {
    parallel(batches * chunks, 0, merge);
  }
}

}  // namespace

void softmax_rows(const GatedWrite& p, SoftmaxRow<float>* rows, const KeptScores<float>& scores) {
  run<float>(p, rows, scores);
}
void softmax_rows(const GatedWrite& p, SoftmaxRow<double>* rows, const KeptScores<double>& scores) {
  run<double>(p, rows, scores);
}

}  // namespace mk::MK_ISA
