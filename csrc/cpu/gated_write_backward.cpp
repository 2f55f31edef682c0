// gated_write backward, erase a number e. With U = dV', R[t] = prod_{u > t} (1 - e a[u]), c[t, i] = <w_t, u_i> and the share of the
// result that was there before token t, seen through U, p_0 = <v_i, u_i>, p_t = (1 - e a[t]) p_{t-1} + a[t] c[t]:
//
//   dV = R[0] U,   dw_t = sum_i a R u_i,   dS[t, i] = R[t] (c[t] - e p_{t-1}) a (1 - a) - g_i retained_i a,   g = d retained
//   dq = scale dS K,   dK = scale dS^T Q,   dmask_i = sum_t dS
//
// p runs forward over the tokens and R backward. A first sweep from the last token keeps R at the chunk boundaries, N T / 96
// numbers; the second goes forward, panel by panel, and recomputes R inside a chunk. Nothing is divided by 1 - a. Slots are lanes.
// Groups of slots are the tasks of a panel: each owns its dK and dV and a partial dq and dw, which are added in group order. Where the
// tokens are one panel, both sweeps are one task, and the last chunks keep their gates in L2 between them: with K=V=64 on Zen 4
// 1.26x for T=512 N=4096 (1.03x of it by the one panel), 1.16x for T=2048 N=1024.
//
// Tokens before the first at which R of a tile of slots is above 0 have no gradient there and are left out. p then starts at 0
// instead of the p of that token: dS changes by a[t] R[t0] / (1 - e a[t]) (1 - a[t]) p, and R[t0] is below the smallest number.
// That holds for a sigmoid (which brings the factor 1 - a) and e up to 1.
#include "cpu/tiles/opened_gates.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t kPanelBytes = int64_t(8) << 20;  // of partial dq and dw

template <class F>
struct Shape {
  int64_t batches, tokens, KP, VP, chunks, group, groups, panel,
      panels;  // chunks and panels in tokens; groups of slots

  explicit Shape(const GatedWrite& p)
      : batches(p.lead.batches()),
        tokens(p.lead.folded() * p.T),
        KP(Slots<F>::padded(p.K)),
        VP(Slots<F>::padded(p.V)),
        chunks(div_up(tokens, kChunkTokens)) {
    group = round_up(most(4 * kSlotTile<F>, div_up(p.N, kChunks)), kSlotTile<F>);
    groups = div_up(p.N, group);
    const int64_t fits = kPanelBytes / (groups * most(KP + VP, 1) * int64_t(sizeof(F)));
    panel = least(most(1, fits / kChunkTokens), most(chunks, 1)) * kChunkTokens;
    panels = div_up(tokens, panel);
  }
  // The last panel is full: most slots remember no more than that.
  int64_t panel_begin(int64_t i) const { return i == 0 ? 0 : chunks * kChunkTokens - (panels - i) * panel; }
};

template <class F>
class Batch {
 public:
  Batch(const GatedWriteBackward& b, const Shape<F>& s, int64_t batch, const SoftmaxRow<F>* softmax, char* memory)
      : b_(b),
        p_(b.forward),
        s_(s),
        batch_(batch),
        source_(p_, batch),
        gates_(p_, batch, softmax),
        keys_(p_.keys, View{}, p_.mask, p_.lead, batch, p_.N, p_.K, 0, true),
        content_(b.d_out, p_.values, p_.mask, p_.lead, batch, p_.N, p_.V, p_.V, true) {
    Arena arena(memory);
    suffix_ = arena.take<F>((s.chunks + 1) * p_.N);
    past_ = arena.take<F>(p_.N);
    dq_ = arena.take<F>(s.groups * s.panel * s.KP);
    dw_ = arena.take<F>(s.groups * s.panel * s.VP);
    touched_ = arena.take<bool>(s.groups * s.panel / kChunkTokens);
    if (p_.gate != Gate::softmax) return;
    start_ = arena.take<F>(p_.N);
    delta_ = arena.take<F>(s.chunks * kChunkTokens);
    deltas_ = arena.take<F>(s.groups * s.panel);
  }
  static size_t bytes(const GatedWrite& p, const Shape<F>& s) {
    const int64_t softmax = p.gate == Gate::softmax ? p.N + s.chunks * kChunkTokens + s.groups * s.panel : 0;
    return size_t((s.chunks + 2) * p.N + s.groups * s.panel * (s.KP + s.VP) + softmax + 128) * sizeof(F) +
           size_t(s.groups * s.panel / kChunkTokens);
  }

  void run() {
    const size_t bytes = scratch();
    if (!at_once()) {
      parallel(div_up(p_.N, kSlotTile<F>), bytes, [&](int64_t task, char* memory) {
        FlushDenormals flush;
        sweep_back(task * kSlotTile<F>, nullptr, Arena(memory));
      });
    }
    if (p_.gate == Gate::softmax) sum_deltas(bytes);
    for (int64_t panel = 0; panel < s_.panels; ++panel) {
      const int64_t p0 = s_.panel_begin(panel), pn = least(s_.panel_begin(panel + 1), s_.tokens) - p0;
      parallel(s_.groups, bytes, [&](int64_t g, char* memory) {
        FlushDenormals flush;
        const Partial part{dq_ + g * s_.panel * s_.KP, dw_ + g * s_.panel * s_.VP, touched(g), nullptr};
        std::memset(part.touched, 0, size_t(s_.panel / kChunkTokens));
        Arena arena(memory);
        Opened<F> last[kLast] = {Opened<F>(arena), Opened<F>(arena), Opened<F>(arena)};
        for (int64_t i = g * s_.group; i < least((g + 1) * s_.group, p_.N); i += kSlotTile<F>) {
          if (at_once()) sweep_back(i, last, arena);
          sweep_forward(i, p0, pn, part, last, arena);
        }
      });
      reduce(p0, pn);
    }
  }

 private:
  // Of a group of slots and a panel of tokens: dq and dw, zero where a chunk was not `touched`; or only `deltas`.
  struct Partial {
    F *dq, *dw;
    bool* touched;
    F* deltas;
  };
  // A call whose tokens are one panel takes a tile of slots back and forth in one go: then the last chunks of tokens, often all that
  // leave a trace, are opened once.
  static constexpr int kLast = 3;
  bool at_once() const {
    return s_.panels == 1 && p_.gate == Gate::sigmoid && p_.erase_scale > 0 && p_.erase_scale <= 1 && !b_.d_retained;
  }
  bool is_last(int64_t chunk) const { return at_once() && chunk >= s_.chunks - kLast; }
  bool* touched(int64_t group) const { return touched_ + group * (s_.panel / kChunkTokens); }

  // delta_t = sum_i a da of a softmax, which every dS of the token needs: a sweep of its own.
  void sum_deltas(size_t bytes) {
    std::memcpy(start_, past_, size_t(p_.N) * sizeof(F));
    for (int64_t p0 = 0; p0 < s_.tokens; p0 += s_.panel) {
      const int64_t pn = least(s_.panel, s_.tokens - p0);
      parallel(s_.groups, bytes, [&](int64_t g, char* memory) {
        FlushDenormals flush;
        F* own = deltas_ + g * s_.panel;
        std::memset(own, 0, size_t(s_.panel) * sizeof(F));
        for (int64_t i = g * s_.group; i < least((g + 1) * s_.group, p_.N); i += kSlotTile<F>) {
          sweep_forward(i, p0, pn, {nullptr, nullptr, nullptr, own}, nullptr, Arena(memory));
        }
      });
      for (int64_t t = 0; t < pn; ++t) {
        F sum = 0;
        for (int64_t g = 0; g < s_.groups; ++g) sum += deltas_[g * s_.panel + t];
        delta_[p0 + t] = sum;
      }
    }
    std::memcpy(past_, start_, size_t(p_.N) * sizeof(F));
  }

  size_t scratch() const {
    Arena measure;
    Slots<F>::buffers(measure, kSlotTile<F>, p_.K, 0);
    Slots<F>::buffers(measure, kSlotTile<F>, p_.V, p_.V);
    Tokens<F>::buffers(measure, p_);
    measure.take<F>((p_.K + 2 * s_.KP + p_.V + 4 * kChunkTokens + 8) * kSlotTile<F>);
    for (int i = 0; i < kLast; ++i) Opened<F>{measure};
    return measure.used() + 16 * 64;
  }
  int64_t width(int64_t first) const { return least(kSlotTile<F>, p_.N - first); }

  // R at the end of every chunk (suffix_[c + 1] belongs behind chunk c), p_0, and dV; `last`: the last chunks, opened.
  void sweep_back(int64_t first, Opened<F>* last, Arena arena) {
    constexpr int W = kLanes<F>;
    const auto key_buffers = Slots<F>::buffers(arena, kSlotTile<F>, p_.K, 0);
    const auto content_buffers = Slots<F>::buffers(arena, kSlotTile<F>, p_.V, p_.V);
    const auto token_buffers = Tokens<F>::buffers(arena, p_);
    KeyLanes<F> lanes(arena, p_.K);
    F* S = arena.take<F>(kChunkTokens * kSlotTile<F>);
    F* R = arena.take<F>(kSlotTile<F>);
    TokenChunk<F> chunk;
    const int64_t count = width(first);
    const SlotBlock<F> block = keys_.load(first, count, key_buffers);
    const SlotBlock<F> content = content_.load(first, count, content_buffers);
    lanes.pack(block, p_.K, F(p_.scale));
    const F e = F(p_.erase_scale);
    for (int64_t j = 0; j < lanes.L; ++j) R[j] = F(j < block.n);
    for (int64_t c = s_.chunks; c-- > 0;) {
      std::memcpy(suffix_ + (c + 1) * p_.N + first, R, size_t(block.n) * sizeof(F));
      const int64_t t0 = c * kChunkTokens;
      bool alive = false;
      for (int64_t j = 0; j < block.n; ++j) alive |= R[j] != 0;
      if (!alive || e == 0) continue;
      source_.load(t0, least(kChunkTokens, s_.tokens - t0), token_buffers, chunk);
      if (is_last(c)) {
        Opened<F>& opened = last[s_.chunks - 1 - c];
        lanes.gates(gates_, chunk, first, count, block, p_.K, opened.scaled);
        opened.open_gates(gates_.kind, chunk, lanes, e, true, R);
        continue;
      }
      lanes.gates(gates_, chunk, first, count, block, p_.K, S);
      for (int64_t l = 0; l < lanes.L; l += W) {
        Vec<F> r = load<F>(R + l), a, keep;
        const Vec<F> m = load<F>(lanes.mask + l);
        for (int64_t t = chunk.n; t-- > 0;) {
          open<F>(gates_.kind, load<F>(S + t * lanes.L + l), m, a, keep);
          r *= left<F>(a, keep, e);
        }
        store<F>(R + l, r);
      }
    }
    for (int64_t j = 0; j < block.n; ++j) {
      const F *u = content.keys + j * content.ks, *v = content.values + j * content.vs;
      Vec<F> sum2 = fill<F>(0);
      for (int64_t x = 0; x < s_.VP; x += W) sum2 += load<F>(u + x) * load<F>(v + x);
      past_[first + j] = sum<F>(sum2);
    }
    if (b_.d_values) pass_through(first, count, block, R);
  }

  // dV = R[0] U; an empty slot kept its content, so its R is 1.
  void pass_through(int64_t first, int64_t count, const SlotBlock<F>& block, const F* R) {
    const bool assign = first_visit(b_.d_values, p_.lead, batch_);
    const char* in = b_.d_out.batch(p_.lead, batch_);
    char* out = b_.d_values.batch(p_.lead, batch_);
    for (int64_t i = 0, j = 0; i < count; ++i) {
      const bool live = j < block.n && block.place(j) == i;
      const F r = live ? R[j++] : F(1);
      const char* u = in + (first + i) * b_.d_out.row;
      F* d = reinterpret_cast<F*>(out + (first + i) * b_.d_values.row);
      for (int64_t v = 0; v < p_.V; ++v) {
        F x;
        read_row<F>(u + v * size_of(b_.d_out.dtype), b_.d_out.dtype, 1, &x);
        d[v] = assign ? r * x : d[v] + r * x;
      }
    }
  }

  // With `deltas`, only sums of a da are taken, and `past_` moves on. `last`: of sweep_back().
  void sweep_forward(int64_t first, int64_t p0, int64_t pn, const Partial& part, Opened<F>* last, Arena arena) {
    constexpr int W = kLanes<F>;
    const auto key_buffers = Slots<F>::buffers(arena, kSlotTile<F>, p_.K, 0);
    const auto content_buffers = Slots<F>::buffers(arena, kSlotTile<F>, p_.V, p_.V);
    const auto token_buffers = Tokens<F>::buffers(arena, p_);
    KeyLanes<F> lanes(arena, p_.K);
    Opened<F> own(arena);
    F* D = arena.take<F>(kChunkTokens * kSlotTile<F>);  // c, then dS
    F* U = arena.take<F>(p_.V * kSlotTile<F>);          // U as lanes
    F* dk = arena.take<F>(p_.K * kSlotTile<F>);
    F* rows = arena.take<F>(s_.KP * kSlotTile<F>);
    F* dm = arena.take<F>(kSlotTile<F>);
    F* past = arena.take<F>(kSlotTile<F>);
    F* suffix = arena.take<F>(kSlotTile<F>);
    F* kept = arena.take<F>(kSlotTile<F>);  // d_retained * retained
    const F none[kChunkTokens] = {};
    F* deltas = part.deltas;
    const TokenRows weights(b_.d_weights, p_.lead, batch_, p_.T);
    const Gate kind = gates_.kind;
    TokenChunk<F> chunk;
    const int64_t count = width(first);
    const SlotBlock<F> block = keys_.load(first, count, key_buffers);
    const SlotBlock<F> content = content_.load(first, count, content_buffers);
    lanes.pack(block, p_.K, F(p_.scale));
    const int64_t L = lanes.L;
    const F e = F(p_.erase_scale);
    pack_lanes<F>(block.n, L, p_.V, F(1), nullptr, U, [&](int64_t j, F*) { return content.keys + j * content.ks; });
    for (int64_t j = 0; j < L; ++j) {
      past[j] = j < block.n ? past_[first + j] : F(0);
      dm[j] = kept[j] = 0;
      if (b_.d_retained && j < block.n) {
        const int64_t i = first + block.place(j);
        kept[j] = *reinterpret_cast<const F*>(b_.d_retained.batch(p_.lead, batch_) + i * b_.d_retained.row) *
                  *reinterpret_cast<const F*>(p_.retained.batch(p_.lead, batch_) + i * p_.retained.row);
      }
    }
    std::memset(dk, 0, size_t(p_.K * L) * sizeof(F));
    bool held = false;  // retained_i has a gradient: then every token that wrote has one
    for (int64_t j = 0; j < L; ++j) held |= kept[j] != 0;
    const bool forgets = kind == Gate::sigmoid && e >= 0 && e <= 1 && !held;

    for (int64_t t0 = p0; t0 < p0 + pn && block.n > 0; t0 += kChunkTokens) {
      bool alive = !forgets;
      for (int64_t j = 0; j < L; ++j) {
        suffix[j] = j < block.n ? suffix_[(t0 / kChunkTokens + 1) * p_.N + first + j] : F(0);
        alive |= suffix[j] != 0;
      }
      if (!alive) {
        for (int64_t j = 0; j < L; ++j) past[j] = 0;
        continue;
      }
      source_.load(t0, least(kChunkTokens, p0 + pn - t0), token_buffers, chunk);
      if (chunk.n == 0) continue;
      const int64_t n = chunk.n;
      const F* delta = deltas != nullptr ? none : delta_ + t0;
      const int64_t c = t0 / kChunkTokens;
      Opened<F>& opened = is_last(c) ? last[s_.chunks - 1 - c] : own;
      if (!is_last(c)) {
        lanes.gates(gates_, chunk, first, count, block, p_.K, opened.scaled);
        opened.open_gates(kind, chunk, lanes, e, forgets, suffix);
      }
      F *A = opened.scaled, *R = opened.rest, *G = opened.gate;
      const int64_t begin = opened.begin, *begins = opened.begins;
      gemm(Gemm<F>{n - begin, L, p_.V, chunk.write + begin * chunk.ws, chunk.ws, 1, U, L, D + begin * L, L, false});
      for (int64_t l = 0; l < L; l += W) {
        for (int64_t x = begin * L + l; x < begins[l / W] * L; x += L) {
          store<F>(R + x, fill<F>(0)), store<F>(G + x, fill<F>(0)), store<F>(A + x, fill<F>(0));
        }
        const Vec<F> m = load<F>(lanes.mask + l), g = load<F>(kept + l);
        Vec<F> p = begin + begins[l / W] > 0 ? fill<F>(0) : load<F>(past + l), total = load<F>(dm + l);
        for (int64_t t = begin; t < n; ++t) {
          const int64_t x = t * L + l;
          Vec<F> gate = load<F>(G + x), keep, ds;
          if (kind == Gate::softmax) open<F>(kind, gate, m, gate, keep);
          const Vec<F> moved = load<F>(D + x) - e * p, da = load<F>(R + x) * moved;
          if (kind == Gate::sigmoid) ds = gate * (da - g);
          else if (kind == Gate::given) ds = da;
          else ds = gate * (da - delta[t] - (keep > 0 ? g / keep : fill<F>(0)));
          p += gate * moved;  // (1 - e a) p + a c
          total += ds;
          store<F>(D + x, ds);
        }
        store<F>(past + l, p);
        store<F>(dm + l, total);
      }
      const int64_t at = t0 - p0;
      for (int64_t t = 0; t < n && deltas != nullptr; ++t) {
        for (int64_t j = 0; j < block.n; ++j) deltas[at + t] += D[t * L + j];
      }
      if (deltas != nullptr) continue;
      if (weights) write_weights<F>(weights, chunk, first, block.n, D, L);
      F *dq = part.dq + at * s_.KP, *dw = part.dw + at * s_.VP;
      if (!part.touched[at / kChunkTokens]) {
        part.touched[at / kChunkTokens] = true;
        std::memset(dq, 0, size_t(n * s_.KP) * sizeof(F));
        std::memset(dw, 0, size_t(n * s_.VP) * sizeof(F));
      }
      const int64_t m = n - begin;
      const F *scaled = A + begin * L, *ds = D + begin * L, *query = chunk.query + begin * chunk.qs;
      dq += begin * s_.KP, dw += begin * s_.VP;
      if (b_.d_write) gemm(Gemm<F>{m, s_.VP, block.n, scaled, L, 1, content.keys, content.ks, dw, s_.VP, true});
      if (b_.d_query) gemm(Gemm<F>{m, s_.KP, block.n, ds, L, 1, block.keys, block.ks, dq, s_.KP, true});
      if (b_.d_keys) gemm(Gemm<F>{p_.K, L, m, query, 1, chunk.qs, ds, L, dk, L, true});
    }

    for (int64_t j = 0; j < block.n; ++j) past_[first + j] = past[j];
    if (deltas != nullptr) return;
    const bool start = p0 == 0;
    if (b_.d_keys) {
      unpack_lanes(dk, L, p_.K, rows, s_.KP);
      scatter_rows<F>(b_.d_keys, p_.lead, batch_, start && first_visit(b_.d_keys, p_.lead, batch_), first, count, block,
                      rows, s_.KP, p_.K, F(p_.scale));
    }
    if (b_.d_mask) {
      scatter_rows<F>(b_.d_mask, p_.lead, batch_, start && first_visit(b_.d_mask, p_.lead, batch_), first, count, block,
                      dm, 1, 1, F(1));
    }
  }

  void reduce(int64_t p0, int64_t pn) {
    const TokenRows query(b_.d_query, p_.lead, batch_, p_.T), write(b_.d_write, p_.lead, batch_, p_.T);
    const TokenRows weights(b_.d_weights, p_.lead, batch_, p_.T), mask(p_.token_mask, p_.lead, batch_, p_.T);
    parallel(div_up(pn, kChunkTokens), size_t(most(s_.KP, s_.VP)) * sizeof(F), [&](int64_t c, char* memory) {
      FlushDenormals flush;
      F* sum = reinterpret_cast<F*>(memory);
      int64_t j = c * kChunkTokens;  // partial rows hold the tokens that write, chunk by chunk
      auto total = [&](const TokenRows& out, const F* parts, int64_t ld, int64_t width, F factor, int64_t t,
                       bool live) {
        if (!out) return;
        for (int64_t x = 0; x < width; ++x) sum[x] = 0;
        for (int64_t g = 0; g < s_.groups && live; ++g) {
          if (!touched(g)[c]) continue;
          const F* part = parts + (g * s_.panel + j) * ld;
          for (int64_t x = 0; x < width; ++x) sum[x] += part[x];
        }
        F* row = reinterpret_cast<F*>(out.row(t));
        for (int64_t x = 0; x < width; ++x) row[x] = factor * sum[x];
      };
      for (int64_t t = p0 + c * kChunkTokens; t < p0 + least((c + 1) * kChunkTokens, pn); ++t) {
        const bool live = !mask || *mask.row(t) != 0;
        if (weights && !live) std::memset(weights.row(t), 0, size_t(p_.N * size_of(weights.dtype)));
        total(query, dq_, s_.KP, p_.K, F(p_.scale), t, live);
        total(write, dw_, s_.VP, p_.V, F(1), t, live);
        j += live;
      }
    });
  }

  const GatedWriteBackward& b_;
  const GatedWrite& p_;
  const Shape<F>& s_;
  int64_t batch_;
  Tokens<F> source_;
  Gates<F> gates_;
  Slots<F> keys_, content_;
  F *suffix_, *past_, *dq_, *dw_;
  bool* touched_;
  F *start_ = nullptr, *delta_ = nullptr, *deltas_ = nullptr;  // of a softmax
};

template <class F>
void run(const GatedWriteBackward& b) {
  const GatedWrite& p = b.forward;
  const Shape<F> s(p);
  const size_t bytes = Batch<F>::bytes(p, s);
  SoftmaxRows<F> softmax(p);
  const bool apart =
      !rows_are_shared(b.d_keys, p.lead) && !rows_are_shared(b.d_values, p.lead) && !rows_are_shared(b.d_mask, p.lead);
  if (s.batches >= kManyBatches && apart) {
    parallel(s.batches, bytes,
             [&](int64_t batch, char* memory) { Batch<F>(b, s, batch, softmax.data(), memory).run(); });
    return;
  }
  Buffer<char> memory{int64_t(bytes)};
  for (int64_t batch = 0; batch < s.batches; ++batch) Batch<F>(b, s, batch, softmax.data(), memory.data()).run();
}

}  // namespace

void gated_write_backward(const GatedWriteBackward& b) {
  if (b.forward.lead_dtype() == DType::f64) run<double>(b);
  else run<float>(b);
}

}  // namespace mk::MK_ISA
