// memory_scan backward. With g_i = dv[t, i] from later tokens, delta_t = <dr_t, r_t>, for t = T .. 1:
//
//   dp[t, i] = <dr_t, v[t, i]>,  g_i <- g_i + p[t, i] dr_t       (with read_first: after the next line, with v[t-1, i])
//   da[t, i] = <g_i, w_t - v[t-1, i]>,  dw_t = sum_i a[t, i] g_i,  g_i <- g_i (1 - a[t, i])
//   dS_r = p (dp - delta),  dS_w = da a (1 - a),  dq = scale dS K,  dK = scale (dS_r^T Q_r + dS_w^T Q_w),
//   dmask_i = sum_t dS
//
// The sums of the softmax are known, so slots do not depend on one another. v cannot be computed backward, since a gate
// of 1 forgets it. It is stored at the start of every panel of tokens (N V T / 1536 numbers), then for a block of slots
// at the start of every chunk of the panel, then at the start of every group of tokens of the chunk. In between it is
// recomputed, six tokens in registers. The inputs of a panel's tokens are packed once for all blocks. The tasks of a
// panel are groups of slots: each owns its g and dK and writes a partial dq and dw, which are added in the order of the
// groups.
#include <vector>

#include "cpu/tiles/scan_back.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t kPanelChunks = 16;
constexpr int64_t kGroups = 4;  // at most so many, which bounds the memory of partial results

template <class F>
struct Shape {
  int64_t batches, tokens, N, K, V, KP, VP, group, groups, panel, panels;  // groups of slots; tokens per panel

  explicit Shape(const GatedWrite& p)
      : batches(p.lead.batches()),
        tokens(p.lead.folded() * p.T),
        N(p.N),
        K(p.K),
        V(p.V),
        KP(Slots<F>::padded(p.K)),
        VP(Slots<F>::padded(p.V)) {
    group = round_up(most(2 * kScanSlots, div_up(N, kGroups)), kScanSlots);
    groups = div_up(N, group);
    panel = least(kPanelChunks, most(1, div_up(tokens, kChunkTokens))) * kChunkTokens;
    panels = div_up(tokens, panel);
  }
};

// The packed inputs of the tokens of a chunk. `n` of them are active (token_mask).
template <class F>
struct Packed {
  F *write_q, *read_q;        // [K][scan_lanes(n)]
  F *write_rows, *read_rows;  // [n][KP]
  F *write, *d_reads;         // [token][VP]
  F *lse, *rest, *delta;      // of the read scores; <dr_t, r_t>
  int64_t* n;

  Packed(const Shape<F>& s, Arena& arena)
      : write_q(arena.take<F>(s.K * kChunkTokens)),
        read_q(arena.take<F>(s.K * kChunkTokens)),
        write_rows(arena.take<F>(s.KP * kChunkTokens)),
        read_rows(arena.take<F>(s.KP * kChunkTokens)),
        write(arena.take<F>(s.VP * kChunkTokens)),
        d_reads(arena.take<F>(s.VP * kChunkTokens)),
        lse(arena.take<F>(kChunkTokens)),
        rest(arena.take<F>(kChunkTokens)),
        delta(arena.take<F>(kChunkTokens)),
        n(arena.take<int64_t>(1)) {}
};

template <class F>
class Batch {
 public:
  Batch(const MemoryScanBackward& b, const Shape<F>& s, int64_t batch, char* memory)
      : b_(b),
        m_(b.forward),
        p_(m_.write),
        s_(s),
        batch_(batch),
        keys_(p_.keys, View{}, p_.mask, p_.lead, batch, p_.N, p_.K, 0, true) {
    Arena arena(memory);
    take(arena);
  }
  static size_t bytes(const MemoryScanBackward& b, const Shape<F>& s) {
    Arena measure;
    Batch(b, s).take(measure);
    return measure.used();
  }

  void run() {
    const int64_t blocks = div_up(s_.N, kScanSlots);
    const size_t bytes = scratch();
    auto each_block = [&](auto&& body) {
      parallel(blocks, bytes, [&](int64_t task, char* memory) {
        FlushDenormals flush;
        const int64_t i = task * kScanSlots;
        body(i, least(kScanSlots, s_.N - i), Arena(memory));
      });
    };
    each_block([&](int64_t i, int64_t count, Arena arena) { start(i, count, arena); });
    for (int64_t panel = 0; panel + 1 < s_.panels; ++panel) {
      pack(panel, false);
      each_block([&](int64_t i, int64_t count, Arena arena) {
        std::memcpy(values_at(panel + 1, i), values_at(panel, i), size_t(count * s_.VP) * sizeof(F));
        Work w(s_, p_, arena);
        const SlotBlock<F> block = keys_.load(i, count, w.buffers);
        for (int64_t c = 0; c < chunks(panel); ++c)
          advance(block, packed_[size_t(c)], values_at(panel + 1, i), nullptr, w);
      });
    }
    for (int64_t panel = s_.panels; panel-- > 0;) {
      pack(panel, true);
      parallel(s_.groups, bytes, [&](int64_t group, char* memory) {
        FlushDenormals flush;
        const int64_t first = group * s_.group, end = least(first + s_.group, s_.N), rows = group * s_.panel;
        std::memset(d_read_q_ + rows * s_.KP, 0, size_t(s_.panel * s_.KP) * sizeof(F));
        std::memset(d_write_q_ + rows * s_.KP, 0, size_t(s_.panel * s_.KP) * sizeof(F));
        std::memset(d_write_ + rows * s_.VP, 0, size_t(s_.panel * s_.VP) * sizeof(F));
        for (int64_t i = first; i < end; i += kScanSlots)
          back(panel, i, least(kScanSlots, end - i), rows, Arena(memory));
      });
      reduce(panel * s_.panel);
    }
    if (b_.d_values) each_block([&](int64_t i, int64_t count, Arena arena) { pass_through(i, count, arena); });
  }

 private:
  Batch(const MemoryScanBackward& b, const Shape<F>& s)
      : b_(b),
        m_(b.forward),
        p_(m_.write),
        s_(s),
        batch_(0),
        keys_(View{}, View{}, View{}, p_.lead, 0, 0, 0, 0, true) {}

  // Scratch of one task.
  struct Work {
    typename Slots<F>::Buffers buffers;
    F *a, *keep, *p, *da, *dp;  // [slot][token]
    F *v, *chunks, *groups;  // values: current, before every chunk of a panel, before every group of tokens of a chunk
    F *dk, *dm;

    Work(const Shape<F>& s, const GatedWrite& p_, Arena& arena)
        : buffers(Slots<F>::buffers(arena, kScanSlots, p_.K, p_.V)),
          a(tile(arena)),
          keep(tile(arena)),
          p(tile(arena)),
          da(tile(arena)),
          dp(tile(arena)),
          v(arena.take<F>(kScanSlots * s.VP)),
          chunks(arena.take<F>(kPanelChunks * kScanSlots * s.VP)),
          groups(arena.take<F>(kChunkTokens / kScanTokens * kScanSlots * s.VP)),
          dk(arena.take<F>(kScanSlots * s.KP)),
          dm(arena.take<F>(kScanSlots)) {}
    static F* tile(Arena& arena) { return arena.take<F>(kScanSlots * kChunkTokens); }
  };
  size_t scratch() const {
    Arena measure;
    Work(s_, p_, measure);
    return measure.used();
  }

  void take(Arena& arena) {
    starts_ = arena.take<F>(most(s_.panels, 1) * s_.N * s_.VP);
    g_ = arena.take<F>(s_.N * s_.VP);
    d_read_q_ = arena.take<F>(s_.groups * s_.panel * s_.KP);
    d_write_q_ = arena.take<F>(s_.groups * s_.panel * s_.KP);
    d_write_ = arena.take<F>(s_.groups * s_.panel * s_.VP);
    for (int64_t c = 0; c < s_.panel / kChunkTokens; ++c) packed_.emplace_back(s_, arena);
  }
  F* values_at(int64_t panel, int64_t slot) { return starts_ + (panel * s_.N + slot) * s_.VP; }
  int64_t chunks(int64_t panel) const { return div_up(least(s_.panel, s_.tokens - panel * s_.panel), kChunkTokens); }

  // Loads values, and the gradient of the new ones, of the non-empty slots of a block.
  void start(int64_t first, int64_t count, Arena arena) {
    const View given = b_.d_out ? b_.d_out : p_.values;
    const Slots<F> values(p_.values, given, p_.mask, p_.lead, batch_, p_.N, p_.V, p_.V, false);
    const auto buffers = Slots<F>::buffers(arena, kScanSlots, p_.V, p_.V);
    SlotBlock<F> block = values.load(first, count, buffers);
    F* g = g_ + first * s_.VP;
    if (b_.d_out) take_values<F>(block, p_.V, g);
    else std::memset(g, 0, size_t(block.n * s_.VP) * sizeof(F));
    block.values = block.keys, block.vs = block.ks;
    take_values<F>(block, p_.V, values_at(0, first));
  }

  // Packs the tokens of a panel; with `whole` also what only the backward sweep needs.
  void pack(int64_t panel, bool whole) {
    Arena measure;
    Tokens<F>::buffers(measure, p_);
    measure.take<F>(s_.VP);
    parallel(chunks(panel), measure.used(), [&](int64_t c, char* memory) {
      FlushDenormals flush;
      Arena arena(memory);
      const auto buffers = Tokens<F>::buffers(arena, p_);
      F* row = arena.take<F>(s_.VP);
      const Packed<F>& to = packed_[size_t(c)];
      const int64_t t0 = panel * s_.panel + c * kChunkTokens, count = least(kChunkTokens, s_.tokens - t0);
      TokenChunk<F> chunk;
      Tokens<F>(p_, batch_).load(t0, count, buffers, chunk);
      *to.n = chunk.n;
      pack_chunk<F>(chunk, p_.K, p_.scale, to.write_q);
      pad_rows<F>(chunk.write, chunk.ws, chunk.n, p_.V, to.write);
      if (!whole) return;
      pad_rows<F>(chunk.query, chunk.qs, chunk.n, p_.K, to.write_rows);
      GatedWrite reads = p_;
      reads.query = m_.read_query, reads.write = b_.d_reads;
      Tokens<F>(reads, batch_).load(t0, count, buffers, chunk);
      pack_chunk<F>(chunk, p_.K, p_.scale, to.read_q);
      pad_rows<F>(chunk.query, chunk.qs, chunk.n, p_.K, to.read_rows);
      if (b_.d_reads) pad_rows<F>(chunk.write, chunk.ws, chunk.n, p_.V, to.d_reads);
      else std::memset(to.d_reads, 0, size_t(kChunkTokens * s_.VP) * sizeof(F));
      const TokenRows lse(m_.lse, p_.lead, batch_, p_.T), rest(m_.lse_rest, p_.lead, batch_, p_.T);
      const TokenRows read(m_.reads, p_.lead, batch_, p_.T);
      for (int64_t t = 0; t < scan_lanes<F>(chunk.n); ++t) {
        to.lse[t] = to.rest[t] = to.delta[t] = 0;
        if (t >= chunk.n) continue;
        const int64_t at = t0 + chunk.token[t];
        to.lse[t] = *reinterpret_cast<const F*>(lse.row(at)), to.rest[t] = *reinterpret_cast<const F*>(rest.row(at));
        const F* r = row_as<F>(read.row(at), read.dtype, p_.V, row);
        for (int64_t v = 0; v < p_.V && b_.d_reads; ++v) to.delta[t] += to.d_reads[t * s_.VP + v] * r[v];
      }
    });
  }

  // Advances v through the writes of a chunk; `groups` receives v before every group of tokens. Leaves the gates in w.
  void advance(const SlotBlock<F>& block, const Packed<F>& c, F* v, F* groups, const Work& w) {
    if (*c.n == 0 || block.n == 0) return;
    scan_gates<F>(block, p_.K, c.write_q, *c.n, w.a, w.keep);
    scan_tile<F, Read::nothing>(ScanTile<F>{block.n, *c.n, s_.VP, w.a, w.keep, w.a, c.write, v, nullptr, groups});
  }

  void back(int64_t panel, int64_t first, int64_t count, int64_t rows, Arena arena) {
    Work w(s_, p_, arena);
    const SlotBlock<F> block = keys_.load(first, count, w.buffers);
    const size_t size = size_t(block.n * s_.VP) * sizeof(F);
    const int64_t all = chunks(panel);
    std::memcpy(w.v, values_at(panel, first), size);
    for (int64_t c = 0; c < all; ++c) {
      std::memcpy(w.chunks + c * kScanSlots * s_.VP, w.v, size);
      if (c + 1 < all) advance(block, packed_[size_t(c)], w.v, nullptr, w);
    }
    std::memset(w.dk, 0, size_t(kScanSlots * s_.KP) * sizeof(F));
    for (int64_t j = 0; j < kScanSlots; ++j) w.dm[j] = 0;
    for (int64_t c = all; c-- > 0 && block.n > 0;) {
      if (*packed_[size_t(c)].n == 0) continue;
      std::memcpy(w.v, w.chunks + c * kScanSlots * s_.VP, size);
      advance(block, packed_[size_t(c)], w.v, w.groups, w);
      chunk_back(block, packed_[size_t(c)], first, rows + c * kChunkTokens, w);
    }
    const bool start = panel + 1 == s_.panels;
    if (b_.d_keys) {
      scatter_rows<F>(b_.d_keys, p_.lead, batch_, start && first_visit(b_.d_keys, p_.lead, batch_), first, count, block,
                      w.dk, s_.KP, p_.K, F(p_.scale));
    }
    if (b_.d_mask) {
      scatter_rows<F>(b_.d_mask, p_.lead, batch_, start && first_visit(b_.d_mask, p_.lead, batch_), first, count, block,
                      w.dm, 1, 1, F(1));
    }
  }

  // `rows`: the first row of the partial gradients of this chunk's tokens.
  void chunk_back(const SlotBlock<F>& block, const Packed<F>& c, int64_t first, int64_t rows, const Work& w) {
    constexpr int W = kLanes<F>;
    const int64_t n = *c.n, L = scan_lanes<F>(n), KP = s_.KP;
    score_columns<F>(block, p_.K, c.read_q, L, w.p);
    for (int64_t j = 0; j < block.n; ++j) {
      F* p = w.p + j * L;
      for (int64_t l = 0; l < L; l += W)
        store<F>(p + l, weight<F>(load<F>(p + l), load<F>(c.lse + l), load<F>(c.rest + l)));
      for (int64_t t = n; t < L; ++t) p[t] = 0;
    }
    back_tile<F>({block.n, n, s_.VP, w.a, w.keep, w.p, c.write, c.d_reads, w.groups, g_ + first * s_.VP,
                  d_write_ + rows * s_.VP, w.da, w.dp},
                 m_.read_first);
    for (int64_t j = 0; j < block.n; ++j) {
      F *da = w.da + j * L, *dp = w.dp + j * L;
      for (int64_t t = n; t < L; ++t) da[t] = dp[t] = 0;
      Vec<F> total = fill<F>(0);
      for (int64_t l = 0; l < L; l += W) {
        const int64_t at = j * L + l;
        const Vec<F> written = load<F>(da + l) * (load<F>(w.a + at) * load<F>(w.keep + at));
        const Vec<F> read = load<F>(w.p + at) * (load<F>(dp + l) - load<F>(c.delta + l));
        store<F>(da + l, written), store<F>(dp + l, read);
        total += written + read;
      }
      w.dm[j] += sum<F>(total);
    }
    if (b_.d_keys) {
      gemm(Gemm<F>{block.n, KP, n, w.da, L, 1, c.write_rows, KP, w.dk, KP, true});
      gemm(Gemm<F>{block.n, KP, n, w.dp, L, 1, c.read_rows, KP, w.dk, KP, true});
    }
    if (b_.d_write_query)
      gemm(Gemm<F>{n, KP, block.n, w.da, 1, L, block.keys, block.ks, d_write_q_ + rows * KP, KP, true});
    if (b_.d_read_query)
      gemm(Gemm<F>{n, KP, block.n, w.dp, 1, L, block.keys, block.ks, d_read_q_ + rows * KP, KP, true});
  }

  void reduce(int64_t p0) {
    const TokenRows read(b_.d_read_query, p_.lead, batch_, p_.T), query(b_.d_write_query, p_.lead, batch_, p_.T);
    const TokenRows write(b_.d_write, p_.lead, batch_, p_.T), mask(p_.token_mask, p_.lead, batch_, p_.T);
    const int64_t pn = least(s_.panel, s_.tokens - p0);
    parallel(div_up(pn, kChunkTokens), 0, [&](int64_t c, char*) {
      FlushDenormals flush;
      int64_t j = c * kChunkTokens;  // rows of partial results are the active tokens, chunk by chunk
      auto total = [&](const TokenRows& out, const F* parts, int64_t ld, int64_t width, F factor, int64_t t,
                       bool live) {
        if (!out) return;
        F* row = reinterpret_cast<F*>(out.row(t));
        for (int64_t x = 0; x < width; ++x) row[x] = 0;
        for (int64_t g = 0; g < s_.groups && live; ++g) {
          const F* part = parts + (g * s_.panel + j) * ld;
          for (int64_t x = 0; x < width; ++x) row[x] += factor * part[x];
        }
      };
      for (int64_t t = p0 + c * kChunkTokens; t < p0 + least((c + 1) * kChunkTokens, pn); ++t) {
        const bool live = !mask || *mask.row(t) != 0;
        total(read, d_read_q_, s_.KP, p_.K, F(p_.scale), t, live);
        total(query, d_write_q_, s_.KP, p_.K, F(p_.scale), t, live);
        total(write, d_write_, s_.VP, p_.V, F(1), t, live);
        j += live;
      }
    });
  }

  // dV = g; an empty slot keeps its content.
  void pass_through(int64_t first, int64_t count, Arena arena) {
    Work w(s_, p_, arena);
    const SlotBlock<F> block = keys_.load(first, count, w.buffers);
    const bool assign = first_visit(b_.d_values, p_.lead, batch_);
    char* out = b_.d_values.batch(p_.lead, batch_);
    for (int64_t i = 0, j = 0; i < count; ++i) {
      const F* g = w.v;
      if (j < block.n && block.place(j) == i) {
        g = g_ + (first + j++) * s_.VP;
      } else if (b_.d_out) {
        read_row<F>(b_.d_out.batch(p_.lead, batch_) + (first + i) * b_.d_out.row, b_.d_out.dtype, p_.V, w.v);
      } else {
        std::memset(w.v, 0, size_t(p_.V) * sizeof(F));
      }
      F* d = reinterpret_cast<F*>(out + (first + i) * b_.d_values.row);
      for (int64_t v = 0; v < p_.V; ++v) d[v] = assign ? g[v] : d[v] + g[v];
    }
  }

  const MemoryScanBackward& b_;
  const MemoryScan& m_;
  const GatedWrite& p_;
  const Shape<F>& s_;
  int64_t batch_;
  Slots<F> keys_;
  F *starts_ = nullptr, *g_ = nullptr;  // values at the start of panels, [panel][slot][VP]
  F *d_read_q_ = nullptr, *d_write_q_ = nullptr, *d_write_ = nullptr;  // [group][token of the panel][KP or VP]
  std::vector<Packed<F>> packed_;                                      // by chunk of the panel
};

template <class F>
void run(const MemoryScanBackward& b) {
  const GatedWrite& p = b.forward.write;
  const Shape<F> s(p);
  each_batch(s.batches, Batch<F>::bytes(b, s), p.lead, {&b.d_keys, &b.d_values, &b.d_mask},
             [&](int64_t batch, char* memory) { Batch<F>(b, s, batch, memory).run(); });
}

}  // namespace

void memory_scan_backward(const MemoryScanBackward& b) {
  if (b.forward.read_query.dtype == DType::f64) run<double>(b);
  else run<float>(b);
}

}  // namespace mk::MK_ISA
