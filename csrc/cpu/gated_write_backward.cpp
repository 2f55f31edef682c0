// gated_write backward, erase a number e. With U = dV', the suffix products R[t] = prod_{u > t} (1 - e a[u]),
// c[t, i] = <w_t, u_i>, and p_t, the inner product of u_i with what slot i holds after token t: p_0 = <v_i, u_i>,
// p_t = (1 - e a[t]) p_{t-1} + a[t] c[t]:
//
//   dV = R[0] U,   dw_t = sum_i a R u_i,   dS[t, i] = R[t] (c[t] - e p_{t-1}) a (1 - a) - g_i retained_i a,
//   g = d retained,   dq = scale dS K,   dK = scale dS^T Q,   dmask_i = sum_t dS
//
// p runs forward over the tokens, R backward. A first sweep from the last token stores R at the chunk boundaries,
// N T / 96 numbers. A second sweep goes forward, panel by panel, and recomputes R inside a chunk. There is no division
// by 1 - a. Lanes are slots. The tasks of a panel are groups of slots: each owns its dK and dV and writes a partial dq
// and dw, which are added in the order of the groups. If the tokens fit one panel, both sweeps are one task, and the
// last chunks keep their gates in L2 in between: with K=V=64 on Zen 4 1.26x for T=512 N=4096 (1.03x of it from the
// single panel), 1.16x for T=2048 N=1024.
//
// Tokens whose suffix product R is 0 in a whole tile of slots are skipped: they have no gradient there. p then starts
// at 0 instead of its value at the first token t0 that is not skipped. This changes dS by a[t] R[t0] / (1 - e a[t])
// (1 - a[t]) p, and R[t0] is below the smallest number. It is valid for a sigmoid, which brings the factor 1 - a, and
// for e up to 1.
#include "cpu/tiles/slot_tile.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t kPanelBytes = int64_t(8) << 20;  // of partial dq and dw

template <class F>
struct Shape {
  int64_t batches, tokens, KP, VP, chunks, group, groups, panel,
      panels;  // chunks and panels count tokens; groups count slots

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
  // The first panel may be short, the last is full: in most slots R is 0 for the tokens of all earlier panels.
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
  // If the tokens fit one panel, a tile of slots runs both sweeps in one task. The gates of the last chunks, often the
  // only ones whose suffix product is not zero, are then computed once.
  static constexpr int kLast = 3;
  bool at_once() const {
    return s_.panels == 1 && p_.gate == Gate::sigmoid && p_.erase_scale > 0 && p_.erase_scale <= 1 && !b_.d_retained;
  }
  bool is_last(int64_t chunk) const { return at_once() && chunk >= s_.chunks - kLast; }
  bool* touched(int64_t group) const { return touched_ + group * (s_.panel / kChunkTokens); }

  // delta_t = sum_i a da of a softmax. Every dS of the token needs it, so it takes a sweep of its own.
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

  // Computes R after every chunk (suffix_[c + 1] is R after chunk c), p_0, and dV. `last` receives the gates of the
  // last chunks.
  void sweep_back(int64_t first, Opened<F>* last, Arena arena) {
    constexpr int W = kLanes<F>;
    SlotTile<F> tile(p_, keys_, content_, first, arena);
    F* S = arena.take<F>(kChunkTokens * kSlotTile<F>);
    F* R = arena.take<F>(kSlotTile<F>);
    const KeyLanes<F>& lanes = tile.lanes;
    const SlotBlock<F>&block = tile.block, &content = tile.content;
    TokenChunk<F>& chunk = tile.chunk;
    const F e = F(p_.erase_scale);
    for (int64_t j = 0; j < lanes.L; ++j) R[j] = F(j < block.n);
    for (int64_t c = s_.chunks; c-- > 0;) {
      std::memcpy(suffix_ + (c + 1) * p_.N + first, R, size_t(block.n) * sizeof(F));
      const int64_t t0 = c * kChunkTokens;
      bool alive = false;
      for (int64_t j = 0; j < block.n; ++j) alive |= R[j] != 0;
      if (!alive || e == 0) continue;
      source_.load(t0, least(kChunkTokens, s_.tokens - t0), tile.buffers, chunk);
      if (is_last(c)) {
        Opened<F>& opened = last[s_.chunks - 1 - c];
        lanes.gates(gates_, chunk, first, tile.count, block, p_.K, opened.scaled);
        opened.open_gates(gates_.kind, chunk, lanes, e, true, R);
        continue;
      }
      lanes.gates(gates_, chunk, first, tile.count, block, p_.K, S);
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
    if (b_.d_values) pass_through(first, tile.count, block, R, arena.take<F>(p_.V));
  }

  // dV = R[0] U; an empty slot keeps its content, so its R is 1.
  void pass_through(int64_t first, int64_t count, const SlotBlock<F>& block, const F* R, F* buffer) {
    const bool assign = first_visit(b_.d_values, p_.lead, batch_);
    const char* in = b_.d_out.batch(p_.lead, batch_);
    char* out = b_.d_values.batch(p_.lead, batch_);
    for (int64_t i = 0, j = 0; i < count; ++i) {
      const bool live = j < block.n && block.place(j) == i;
      const F r = live ? R[j++] : F(1);
      const F* u = row_as<F>(in + (first + i) * b_.d_out.row, b_.d_out.dtype, p_.V, buffer);
      F* d = reinterpret_cast<F*>(out + (first + i) * b_.d_values.row);
      constexpr int W = kLanes<F>;
      int64_t v = 0;
      for (; v + W <= p_.V; v += W) {
        const Vec<F> x = r * load<F>(u + v);
        store<F>(d + v, assign ? x : load<F>(d + v) + x);
      }
      for (; v < p_.V; ++v) d[v] = assign ? r * u[v] : d[v] + r * u[v];
    }
  }

  // With `deltas`, only computes sums of a da and advances `past_`. `last`: from sweep_back().
  void sweep_forward(int64_t first, int64_t p0, int64_t pn, const Partial& part, Opened<F>* last, Arena arena) {
    SlotTile<F> tile(p_, keys_, content_, first, arena);
    SlotSums<F> sums(p_, arena);
    start(tile, sums);
    // If retained_i has a gradient, every token that writes has one.
    const F e = F(p_.erase_scale);
    const bool forgets = gates_.kind == Gate::sigmoid && e >= 0 && e <= 1 && !sums.held;
    for (int64_t t0 = p0; t0 < p0 + pn && tile.block.n > 0; t0 += kChunkTokens) {
      if (!load_suffix(tile, t0 / kChunkTokens, sums) && forgets) {
        for (int64_t j = 0; j < tile.lanes.L; ++j) sums.past[j] = 0;
        continue;
      }
      source_.load(t0, least(kChunkTokens, p0 + pn - t0), tile.buffers, tile.chunk);
      if (tile.chunk.n == 0) continue;
      const Opened<F>& opened = open_chunk(tile, t0 / kChunkTokens, forgets, last, sums);
      score_chunk(tile, opened, t0, part.deltas != nullptr, sums);
      if (part.deltas != nullptr) add_deltas(tile, sums, part.deltas + t0 - p0);
      else add_products(tile, opened, t0 - p0, part, sums);
    }
    for (int64_t j = 0; j < tile.block.n; ++j) past_[first + j] = sums.past[j];
    if (part.deltas == nullptr) store_slots(tile, p0 == 0, sums);
  }

  // U as lanes, p before the panel and d_retained * retained; sums of 0.
  void start(const SlotTile<F>& tile, SlotSums<F>& sums) const {
    const SlotBlock<F>& content = tile.content;
    const int64_t L = tile.lanes.L;
    pack_lanes<F>(tile.block.n, L, p_.V, F(1), nullptr, sums.U,
                  [&](int64_t j, F*) { return content.keys + j * content.ks; });
    for (int64_t j = 0; j < L; ++j) {
      sums.past[j] = j < tile.block.n ? past_[tile.first + j] : F(0);
      sums.dm[j] = sums.kept[j] = 0;
      if (b_.d_retained && j < tile.block.n) {
        const int64_t i = tile.first + tile.block.place(j);
        sums.kept[j] = *reinterpret_cast<const F*>(b_.d_retained.batch(p_.lead, batch_) + i * b_.d_retained.row) *
                       *reinterpret_cast<const F*>(p_.retained.batch(p_.lead, batch_) + i * p_.retained.row);
      }
      sums.held |= sums.kept[j] != 0;
    }
    std::memset(sums.dk, 0, size_t(p_.K * L) * sizeof(F));
  }

  // R after chunk c. Returns whether it is not 0 somewhere.
  bool load_suffix(const SlotTile<F>& tile, int64_t c, SlotSums<F>& sums) const {
    bool alive = false;
    for (int64_t j = 0; j < tile.lanes.L; ++j) {
      sums.suffix[j] = j < tile.block.n ? suffix_[(c + 1) * p_.N + tile.first + j] : F(0);
      alive |= sums.suffix[j] != 0;
    }
    return alive;
  }

  // The gates of chunk c and their suffix products.
  const Opened<F>& open_chunk(const SlotTile<F>& tile, int64_t c, bool forgets, const Opened<F>* last,
                              SlotSums<F>& sums) const {
    if (is_last(c)) return last[s_.chunks - 1 - c];
    tile.lanes.gates(gates_, tile.chunk, tile.first, tile.count, tile.block, p_.K, sums.opened.scaled);
    sums.opened.open_gates(gates_.kind, tile.chunk, tile.lanes, F(p_.erase_scale), forgets, sums.suffix);
    return sums.opened;
  }

  // D = dS of the tokens of a chunk, which begins at t0; without `delta` of a softmax if that is being summed.
  void score_chunk(const SlotTile<F>& tile, const Opened<F>& opened, int64_t t0, bool for_deltas,
                   SlotSums<F>& sums) const {
    static constexpr F kNone[kChunkTokens] = {};
    const TokenChunk<F>& chunk = tile.chunk;
    const int64_t L = tile.lanes.L, begin = opened.begin;
    gemm(Gemm<F>{chunk.n - begin, L, p_.V, chunk.write + begin * chunk.ws, chunk.ws, 1, sums.U, L, sums.D + begin * L,
                 L, false});
    opened.to_gradients(gates_.kind, chunk.n, tile.lanes, F(p_.erase_scale), sums.kept,
                        for_deltas ? kNone : delta_ + t0, sums.D, sums.past, sums.dm);
  }

  // deltas [chunk] += the sums of D over the slots.
  void add_deltas(const SlotTile<F>& tile, const SlotSums<F>& sums, F* deltas) const {
    for (int64_t t = 0; t < tile.chunk.n; ++t) {
      for (int64_t j = 0; j < tile.block.n; ++j) deltas[t] += sums.D[t * tile.lanes.L + j];
    }
  }

  // The sums of a chunk, which begins at token `at` of the panel: dw += a R U, dq += dS K, dk += dS^T Q.
  void add_products(const SlotTile<F>& tile, const Opened<F>& opened, int64_t at, const Partial& part,
                    SlotSums<F>& sums) const {
    const TokenChunk<F>& chunk = tile.chunk;
    const SlotBlock<F>&block = tile.block, &content = tile.content;
    const int64_t L = tile.lanes.L, n = chunk.n, begin = opened.begin, m = n - begin;
    const TokenRows weights(b_.d_weights, p_.lead, batch_, p_.T);
    if (weights) write_weights<F>(weights, chunk, tile.first, block.n, sums.D, L);
    F *dq = part.dq + at * s_.KP, *dw = part.dw + at * s_.VP;
    if (!part.touched[at / kChunkTokens]) {
      part.touched[at / kChunkTokens] = true;
      std::memset(dq, 0, size_t(n * s_.KP) * sizeof(F));
      std::memset(dw, 0, size_t(n * s_.VP) * sizeof(F));
    }
    const F *scaled = opened.scaled + begin * L, *ds = sums.D + begin * L, *query = chunk.query + begin * chunk.qs;
    dq += begin * s_.KP, dw += begin * s_.VP;
    if (b_.d_write) gemm(Gemm<F>{m, s_.VP, block.n, scaled, L, 1, content.keys, content.ks, dw, s_.VP, true});
    if (b_.d_query) gemm(Gemm<F>{m, s_.KP, block.n, ds, L, 1, block.keys, block.ks, dq, s_.KP, true});
    if (b_.d_keys) gemm(Gemm<F>{p_.K, L, m, query, 1, chunk.qs, ds, L, sums.dk, L, true});
  }

  // Stores dK and dmask, or adds them to those of earlier panels.
  void store_slots(const SlotTile<F>& tile, bool start, SlotSums<F>& sums) const {
    auto scatter = [&](const View& view, const F* rows, int64_t ld, int64_t width, F factor) {
      scatter_rows<F>(view, p_.lead, batch_, start && first_visit(view, p_.lead, batch_), tile.first, tile.count,
                      tile.block, rows, ld, width, factor);
    };
    if (b_.d_keys) {
      unpack_lanes(sums.dk, tile.lanes.L, p_.K, sums.rows, s_.KP);
      scatter(b_.d_keys, sums.rows, s_.KP, p_.K, F(p_.scale));
    }
    if (b_.d_mask) scatter(b_.d_mask, sums.dm, 1, 1, F(1));
  }

  void reduce(int64_t p0, int64_t pn) {
    const TokenRows query(b_.d_query, p_.lead, batch_, p_.T), write(b_.d_write, p_.lead, batch_, p_.T);
    const TokenRows weights(b_.d_weights, p_.lead, batch_, p_.T), mask(p_.token_mask, p_.lead, batch_, p_.T);
    parallel(div_up(pn, kChunkTokens), size_t(most(s_.KP, s_.VP)) * sizeof(F), [&](int64_t c, char* memory) {
      FlushDenormals flush;
      F* sum = reinterpret_cast<F*>(memory);
      int64_t j = c * kChunkTokens;  // rows of partial results are the tokens that write, chunk by chunk
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
  SoftmaxRows<F> softmax(p);
  each_batch(s.batches, Batch<F>::bytes(p, s), p.lead, {&b.d_keys, &b.d_values, &b.d_mask},
             [&](int64_t batch, char* memory) { Batch<F>(b, s, batch, softmax.data(), memory).run(); });
}

}  // namespace

void gated_write_backward(const GatedWriteBackward& b) {
  if (b.forward.lead_dtype() == DType::f64) run<double>(b);
  else run<float>(b);
}

}  // namespace mk::MK_ISA
