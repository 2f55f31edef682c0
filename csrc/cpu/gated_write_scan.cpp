// gated_write with an erase vector e_t (Neural Turing Machine erase and add), forward and backward.
//
//   v[i, j] <- v[i, j] (1 - a[t, i] e[t, j]) + a[t, i] w[t, j]
//
// The factor depends on slot, token and column, so there is no matrix product. Rows of slots stay in registers while
// the tokens pass. Gates come from the same tiles as in the closed form. Parallel over batches and blocks of slots. Per
// token and register of columns, one load each of w and e serves four slots. v + a (w - e v) would save one operation,
// but it is not exact for a = e = 1. Few tokens are written by gated_write.cpp.
//
// Backward, g = dV' walking from the last token; v_{t-1} is recomputed per chunk from values stored at chunk
// boundaries:
//   dw_t = sum_i a g,  de_t = -sum_i a g v_{t-1},  da = sum_j g (w - e v_{t-1}),  g <- g (1 - a e),  dV = g in the end
//   dS = da a (1 - a) - d retained * retained * a
#include "cpu/tiles/write_tiles.h"

namespace mk::MK_ISA {
namespace {

// Advances `S` rows of slots by one chunk, NV registers of columns at a time. gates[t * L + slot].
template <class F, int S, int NV>
void advance(const TokenChunk<F>& c, const F* gates, int64_t L, int64_t column, F* rows, int64_t ld) {
  constexpr int W = kLanes<F>;
  Vec<F> v[S][NV];
  for (int s = 0; s < S; ++s) {
    for (int j = 0; j < NV; ++j) v[s][j] = load<F>(rows + s * ld + column + j * W);
  }
  for (int64_t t = 0; t < c.n; ++t) {
    for (int j = 0; j < NV; ++j) {
      const Vec<F> w = load<F>(c.write + t * c.ws + column + j * W), e = load<F>(c.erase + t * c.es + column + j * W);
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) {
        const Vec<F> a = fill<F>(gates[t * L + s]);
        v[s][j] = a * w + (F(1) - a * e) * v[s][j];
      }
    }
  }
  for (int s = 0; s < S; ++s) {
    for (int j = 0; j < NV; ++j) store<F>(rows + s * ld + column + j * W, v[s][j]);
  }
}

template <class F>
void advance_block(const TokenChunk<F>& c, const F* gates, int64_t L, int64_t slots, int64_t VP, F* rows) {
  constexpr int W = kLanes<F>;
  for (int64_t i = 0; i < slots;) {
    const int64_t step = slots - i >= 4 ? 4 : 1;
    for (int64_t column = 0; column < VP; column += W) {
      if (step == 4) advance<F, 4, 1>(c, gates + i, L, column, rows + i * VP, VP);
      else advance<F, 1, 1>(c, gates + i, L, column, rows + i * VP, VP);
    }
    i += step;
  }
}

// Turns scores of a chunk into gates. `keep` (or null) receives 1 - a, and kept[lane] is multiplied by it.
template <class F>
void to_gates(const KeyLanes<F>& lanes, Gate kind, int64_t n, F* S, F* keep, F* kept) {
  constexpr int W = kLanes<F>;
  for (int64_t l = 0; l < lanes.L; l += W) {
    const Vec<F> m = load<F>(lanes.mask + l);
    Vec<F> product = load<F>(kept + l), a, k;
    for (int64_t t = 0; t < n; ++t) {
      open<F>(kind, load<F>(S + t * lanes.L + l), m, a, k);
      store<F>(S + t * lanes.L + l, a);
      if (keep != nullptr) store<F>(keep + t * lanes.L + l, k);
      product *= k;
    }
    store<F>(kept + l, product);
  }
}

template <class F>
void forward_block(const GatedWrite& p, int64_t batch, int64_t first, int64_t count, int64_t tokens,
                   const SoftmaxRow<F>* softmax, Arena arena) {
  const int64_t VP = Slots<F>::padded(p.V);
  const Slots<F> slots(p.keys, p.values, p.mask, p.lead, batch, p.N, p.K, p.V, false);
  const auto buffers = Slots<F>::buffers(arena, kSlotTile<F>, p.K, p.V);
  const auto token_buffers = Tokens<F>::buffers(arena, p);
  KeyLanes<F> lanes(arena, p.K);
  F* S = arena.take<F>(kChunkTokens * kSlotTile<F>);
  F* rows = arena.take<F>(kSlotTile<F> * VP);
  F* kept = arena.take<F>(kSlotTile<F>);
  TokenChunk<F> chunk;
  const Tokens<F> source(p, batch);
  const Gates<F> gates(p, batch, softmax);
  const SlotBlock<F> block = slots.load(first, count, buffers);
  lanes.pack(block, p.K, F(p.scale));
  for (int64_t j = 0; j < kSlotTile<F>; ++j) kept[j] = 1;
  for (int64_t j = 0; j < block.n; ++j) {
    std::memcpy(rows + j * VP, block.values + j * block.vs, size_t(p.V) * sizeof(F));
    for (int64_t v = p.V; v < VP; ++v) rows[j * VP + v] = 0;
  }
  for (int64_t t0 = 0; t0 < tokens && block.n > 0; t0 += kChunkTokens) {
    source.load(t0, least(kChunkTokens, tokens - t0), token_buffers, chunk);
    lanes.gates(gates, chunk, first, count, block, p.K, S);
    to_gates<F>(lanes, gates.kind, chunk.n, S, nullptr, kept);
    advance_block<F>(chunk, S, lanes.L, block.n, VP, rows);
  }
  const char* in = p.values.batch(p.lead, batch);
  char* out = p.out.batch(p.lead, batch);
  char* retained = p.retained.batch(p.lead, batch);
  for (int64_t i = 0, j = 0; i < count; ++i) {
    const bool live = j < block.n && block.place(j) == i;
    const int64_t at = first + i;
    if (live) {
      write_row<F>(rows + j * VP, p.V, p.out.dtype, out + at * p.out.row);
    } else if (p.out.data != p.values.data) {
      read_row<F>(in + at * p.values.row, p.values.dtype, p.V, S);
      write_row<F>(S, p.V, p.out.dtype, out + at * p.out.row);
    }
    *reinterpret_cast<F*>(retained + at * p.retained.row) = live ? kept[j] : F(1);
    j += live;
  }
}

template <class F>
void run(const GatedWrite& p) {
  const int64_t blocks = div_up(p.N, kSlotTile<F>), tokens = p.lead.folded() * p.T;
  Arena measure;
  Slots<F>::buffers(measure, kSlotTile<F>, p.K, p.V);
  Tokens<F>::buffers(measure, p);
  measure.take<F>((p.K + kChunkTokens + Slots<F>::padded(p.V) + 2) * kSlotTile<F> + p.V);
  SoftmaxRows<F> softmax(p);
  parallel(p.lead.batches() * blocks, measure.used() + 12 * 64, [&](int64_t task, char* memory) {
    FlushDenormals flush;
    const int64_t first = task % blocks * kSlotTile<F>;
    forward_block<F>(p, task / blocks, first, least(kSlotTile<F>, p.N - first), tokens, softmax.data(), Arena(memory));
  });
}

// One group of slots: its dK, dV and dmask, and its part of dq, dw and de as rows [KP | VP | VP] per writing token,
// chunk by chunk.
template <class F>
class Group {
 public:
  Group(const GatedWriteBackward& b, int64_t batch, int64_t tokens, const SoftmaxRow<F>* softmax, F* part)
      : b_(b),
        p_(b.forward),
        batch_(batch),
        tokens_(tokens),
        chunks_(div_up(tokens, kChunkTokens)),
        KP_(Slots<F>::padded(p_.K)),
        VP_(Slots<F>::padded(p_.V)),
        dq_(part),
        dw_(part + tokens * KP_),
        de_(part + tokens * (KP_ + VP_)),
        source_(p_, batch),
        gates_(p_, batch, softmax),
        keys_(p_.keys, View{}, p_.mask, p_.lead, batch, p_.N, p_.K, 0, true),
        content_(b.d_out, p_.values, p_.mask, p_.lead, batch, p_.N, p_.V, p_.V, true) {}

  static size_t scratch(const GatedWrite& p, int64_t tokens) {
    const int64_t KP = Slots<F>::padded(p.K), VP = Slots<F>::padded(p.V);
    Arena measure;
    Slots<F>::buffers(measure, kSlotTile<F>, p.K, 0);
    Slots<F>::buffers(measure, kSlotTile<F>, p.V, p.V);
    Tokens<F>::buffers(measure, p);
    measure.take<F>((2 * p.K + KP + 2 * VP + 4 * kChunkTokens + 5 + div_up(tokens, kChunkTokens) * VP) * kSlotTile<F>);
    measure.take<F>(kChunkTokens * VP);
    return measure.used() + 24 * 64;
  }

  // dS of a softmax needs delta_t = sum_i a da over all slots. A first run only adds to `deltas`; a second one reads
  // `delta`.
  void block(int64_t first, int64_t count, const F* delta, F* deltas, Arena arena) const {
    constexpr int W = kLanes<F>;
    const auto key_buffers = Slots<F>::buffers(arena, kSlotTile<F>, p_.K, 0);
    const auto content_buffers = Slots<F>::buffers(arena, kSlotTile<F>, p_.V, p_.V);
    const auto token_buffers = Tokens<F>::buffers(arena, p_);
    KeyLanes<F> lanes(arena, p_.K);
    F* A = arena.take<F>(kChunkTokens * kSlotTile<F>);
    F* keep = arena.take<F>(kChunkTokens * kSlotTile<F>);
    F* D = arena.take<F>(kChunkTokens * kSlotTile<F>);
    F* kept = arena.take<F>(kSlotTile<F>);
    F* grad = arena.take<F>(kSlotTile<F> * VP_);                                  // g
    F* start = arena.take<F>(chunks_ * kSlotTile<F> * VP_ + kSlotTile<F> * VP_);  // rows at chunk boundaries
    F* past = arena.take<F>(kChunkTokens * VP_);  // v_{t-1} of one slot for the tokens of one chunk
    F* dk = arena.take<F>(p_.K * kSlotTile<F>);
    F* rows = arena.take<F>(KP_ * kSlotTile<F>);
    F* dm = arena.take<F>(kSlotTile<F>);
    TokenChunk<F> chunk;
    const TokenRows weights(b_.d_weights, p_.lead, batch_, p_.T);
    const SlotBlock<F> block = keys_.load(first, count, key_buffers);
    const SlotBlock<F> content = content_.load(first, count, content_buffers);
    lanes.pack(block, p_.K, F(p_.scale));
    const int64_t L = lanes.L, size = kSlotTile<F> * VP_;
    for (int64_t j = 0; j < L; ++j) kept[j] = 1, dm[j] = 0;
    std::memset(dk, 0, size_t(p_.K * L) * sizeof(F));
    for (int64_t j = 0; j < block.n; ++j) {
      std::memcpy(start + j * VP_, content.values + j * content.vs, size_t(VP_) * sizeof(F));
      std::memcpy(grad + j * VP_, content.keys + j * content.ks, size_t(VP_) * sizeof(F));
    }
    for (int64_t c = 0; c + 1 < chunks_; ++c) {
      gates(c, lanes, first, count, block, token_buffers, chunk, A, nullptr, kept);
      std::memcpy(start + (c + 1) * size, start + c * size, size_t(block.n * VP_) * sizeof(F));
      advance_block<F>(chunk, A, L, block.n, VP_, start + (c + 1) * size);
    }
    for (int64_t j = 0; j < L; ++j) {
      kept[j] = 0;  // from here on d_retained * retained
      if (!b_.d_retained || j >= block.n) continue;
      const int64_t i = first + block.place(j);
      kept[j] = *reinterpret_cast<const F*>(b_.d_retained.batch(p_.lead, batch_) + i * b_.d_retained.row) *
                *reinterpret_cast<const F*>(p_.retained.batch(p_.lead, batch_) + i * p_.retained.row);
    }
    for (int64_t c = chunks_; c-- > 0 && block.n > 0;) {
      F unused[kSlotTile<F>];
      for (F& x : unused) x = 1;
      gates(c, lanes, first, count, block, token_buffers, chunk, A, keep, unused);
      const int64_t t0 = c * kChunkTokens;
      for (int64_t x = 0; x < chunk.n * L; ++x) D[x] = 0;
      for (int64_t j = 0; j < block.n; ++j) {
        F* v = start + c * size + j * VP_;
        for (int64_t t = 0; t < chunk.n; ++t) {
          std::memcpy(past + t * VP_, v, size_t(VP_) * sizeof(F));
          const Vec<F> a = fill<F>(A[t * L + j]);
          for (int64_t x = 0; x < VP_; x += W) {
            const Vec<F> e = load<F>(chunk.erase + t * chunk.es + x), w = load<F>(chunk.write + t * chunk.ws + x);
            store<F>(v + x, a * w + (F(1) - a * e) * load<F>(v + x));
          }
        }
        F* g = grad + j * VP_;
        for (int64_t t = chunk.n; t-- > 0;) {
          const F gate = A[t * L + j];
          const Vec<F> a = fill<F>(gate);
          Vec<F> da = fill<F>(0);
          for (int64_t x = 0; x < VP_; x += W) {
            const Vec<F> e = load<F>(chunk.erase + t * chunk.es + x), w = load<F>(chunk.write + t * chunk.ws + x);
            const Vec<F> gv = load<F>(g + x), before = load<F>(past + t * VP_ + x), ag = a * gv;
            da += gv * (w - e * before);
            F *dw = dw_ + (t0 + t) * VP_ + x, *de = de_ + (t0 + t) * VP_ + x;
            store<F>(dw, load<F>(dw) + ag);
            store<F>(de, load<F>(de) - ag * before);
            store<F>(g + x, gv - e * ag);
          }
          const F k = keep[t * L + j];
          F& ds = D[t * L + j];
          if (p_.gate == Gate::sigmoid) ds = gate * (sum<F>(da) * k - kept[j]);
          else if (p_.gate == Gate::given) ds = sum<F>(da);
          else ds = gate * (sum<F>(da) - (k > 0 ? kept[j] / k : F(0)) - (delta == nullptr ? F(0) : delta[t0 + t]));
        }
      }
      for (int64_t t = 0; t < chunk.n && deltas != nullptr; ++t) {
        for (int64_t j = 0; j < block.n; ++j) deltas[t0 + t] += D[t * L + j];
      }
      if (deltas != nullptr) continue;
      if (weights) write_weights<F>(weights, chunk, first, block.n, D, L);
      if (p_.gate == Gate::given) continue;
      gemm(Gemm<F>{chunk.n, KP_, block.n, D, L, 1, block.keys, block.ks, dq_ + t0 * KP_, KP_, true});
      gemm(Gemm<F>{p_.K, L, chunk.n, chunk.query, 1, chunk.qs, D, L, dk, L, true});
      for (int64_t t = 0; t < chunk.n; ++t) {
        for (int64_t j = 0; j < block.n; ++j) dm[j] += D[t * L + j];
      }
    }
    if (deltas == nullptr) write_out(first, count, block, grad, dk, L, rows, dm);
  }

 private:
  void gates(int64_t c, const KeyLanes<F>& lanes, int64_t first, int64_t count, const SlotBlock<F>& block,
             const typename Tokens<F>::Buffers& buffers, TokenChunk<F>& chunk, F* A, F* keep, F* kept) const {
    source_.load(c * kChunkTokens, least(kChunkTokens, tokens_ - c * kChunkTokens), buffers, chunk);
    lanes.gates(gates_, chunk, first, count, block, p_.K, A);
    to_gates<F>(lanes, gates_.kind, chunk.n, A, keep, kept);
  }

  void write_out(int64_t first, int64_t count, const SlotBlock<F>& block, const F* grad, const F* dk, int64_t L,
                 F* rows, const F* dm) const {
    const Lead& lead = p_.lead;
    if (b_.d_values) {
      const bool assign = first_visit(b_.d_values, lead, batch_);
      // Empty slots keep their content, so their gradient is passed on unchanged.
      char* out = b_.d_values.batch(lead, batch_) + first * b_.d_values.row;
      const char* in = b_.d_out.batch(lead, batch_) + first * b_.d_out.row;
      scatter_rows<F>(b_.d_values, lead, batch_, assign, first, count, block, grad, VP_, p_.V, F(1));
      for (int64_t i = 0, j = 0; i < count; ++i) {
        if (j < block.n && block.place(j) == i) {
          ++j;
          continue;
        }
        F* d = reinterpret_cast<F*>(out + i * b_.d_values.row);
        for (int64_t v = 0; v < p_.V; ++v) {
          F x;
          read_row<F>(in + i * b_.d_out.row + v * size_of(b_.d_out.dtype), b_.d_out.dtype, 1, &x);
          d[v] += x;
        }
      }
    }
    if (b_.d_keys) {
      unpack_lanes(dk, L, p_.K, rows, KP_);
      const bool assign = first_visit(b_.d_keys, lead, batch_);
      scatter_rows<F>(b_.d_keys, lead, batch_, assign, first, count, block, rows, KP_, p_.K, F(p_.scale));
    }
    if (b_.d_mask) {
      scatter_rows<F>(b_.d_mask, lead, batch_, first_visit(b_.d_mask, lead, batch_), first, count, block, dm, 1, 1,
                      F(1));
    }
  }

  const GatedWriteBackward& b_;
  const GatedWrite& p_;
  int64_t batch_, tokens_, chunks_, KP_, VP_;
  F *dq_, *dw_, *de_;
  Tokens<F> source_;
  Gates<F> gates_;
  Slots<F> keys_, content_;
};

template <class F>
void run_backward(const GatedWriteBackward& b) {
  const GatedWrite& p = b.forward;
  const int64_t tokens = p.lead.folded() * p.T, KP = Slots<F>::padded(p.K), VP = Slots<F>::padded(p.V);
  const int64_t part = most(tokens * (KP + 2 * VP), 1), blocks = div_up(p.N, kSlotTile<F>);
  // A part has a row per token. There are few groups, so that the parts are small compared with a [T, N] matrix.
  const int64_t groups = least(blocks, most(2, least(kChunks, kPartialBytes / (part * int64_t(sizeof(F))))));
  const int64_t group = div_up(blocks, groups);
  SoftmaxRows<F> softmax(p);
  const int64_t rows = p.gate == Gate::softmax ? round_up(tokens, kChunkTokens) : 0;
  Arena measure;
  for (int64_t count : {groups * part, groups * rows, rows}) measure.take<F>(count);
  const auto run_batch = [&](int64_t batch, char* own_memory) {
    Arena arena(own_memory);
    F *parts = arena.take<F>(groups * part), *deltas = arena.take<F>(groups * rows), *delta = arena.take<F>(rows);
    auto sweep = [&](const F* known, F* sums) {
      parallel(groups, Group<F>::scratch(p, tokens), [&](int64_t g, char* memory) {
        FlushDenormals flush;
        F *own = parts + g * part, *own_sums = sums == nullptr ? nullptr : sums + g * rows;
        std::memset(own, 0, size_t(part) * sizeof(F));
        if (sums != nullptr) std::memset(own_sums, 0, size_t(rows) * sizeof(F));
        const Group<F> work(b, batch, tokens, softmax.data(), own);
        for (int64_t x = g * group; x < least((g + 1) * group, blocks); ++x) {
          const int64_t first = x * kSlotTile<F>;
          work.block(first, least(kSlotTile<F>, p.N - first), known, own_sums, Arena(memory));
        }
      });
    };
    if (rows > 0) {
      sweep(nullptr, deltas);
      for (int64_t t = 0; t < rows; ++t) {
        delta[t] = 0;
        for (int64_t g = 0; g < groups; ++g) delta[t] += deltas[g * rows + t];
      }
    }
    sweep(delta, nullptr);
    const TokenRows query(b.d_query, p.lead, batch, p.T), write(b.d_write, p.lead, batch, p.T);
    const TokenRows erase(b.d_erase, p.lead, batch, p.T), mask(p.token_mask, p.lead, batch, p.T);
    const TokenRows weights(b.d_weights, p.lead, batch, p.T);
    parallel(div_up(tokens, kChunkTokens), 0, [&](int64_t c, char*) {
      int64_t j = c * kChunkTokens;
      auto total = [&](const TokenRows& out, int64_t offset, int64_t ld, int64_t width, F factor, int64_t t,
                       bool live) {
        if (!out) return;
        F* row = reinterpret_cast<F*>(out.row(t));
        for (int64_t x = 0; x < width; ++x) row[x] = 0;
        for (int64_t g = 0; g < groups && live; ++g) {
          const F* from = parts + g * part + offset + j * ld;
          for (int64_t x = 0; x < width; ++x) row[x] += factor * from[x];
        }
      };
      for (int64_t t = c * kChunkTokens; t < least((c + 1) * kChunkTokens, tokens); ++t) {
        const bool live = !mask || *mask.row(t) != 0;
        if (weights && !live) std::memset(weights.row(t), 0, size_t(p.N * size_of(weights.dtype)));
        total(query, 0, KP, p.K, F(p.scale), t, live);
        total(write, tokens * KP, VP, p.V, F(1), t, live);
        total(erase, tokens * (KP + VP), VP, p.V, F(1), t, live);
        j += live;
      }
    });
  };
  each_batch(p.lead.batches(), measure.used(), p.lead, {&b.d_keys, &b.d_values, &b.d_mask}, run_batch);
}

}  // namespace

void gated_write_scan(const GatedWrite& p) {
  const int64_t tokens = p.lead.folded() * p.T;
  if (p.lead_dtype() == DType::f64 ? few_tokens<double>(tokens) : few_tokens<float>(tokens)) gated_write(p);
  else if (p.lead_dtype() == DType::f64) run<double>(p);
  else run<float>(p);
}

void gated_write_scan_backward(const GatedWriteBackward& b) {
  if (b.forward.lead_dtype() == DType::f64) run_backward<double>(b);
  else run_backward<float>(b);
}

}  // namespace mk::MK_ISA
