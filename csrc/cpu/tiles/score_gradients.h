// Gradients computed from score tiles: d_query, d_keys, d_values, d_mask from dS (and P), block by block.
//
// Tokens are split into panels and slots into chunks, by shapes only. Within a panel every chunk is a task. It owns its
// rows of d_keys, d_values and d_mask, sums them over the panel's tokens in cache, and writes a partial d_query.
// Partial d_queries are then added in the order of the chunks. So nothing is computed twice, the order does not depend
// on threads, and the memory of partial results is bounded (kPartialBytes) however long the inputs are. Where slots are
// few, the tasks are chunks of segments of a panel (gradient_segments.h).
//
// Tokens with ranges (ranges.h): tiles are skipped where no token may address a slot of the block. P and D are zero
// outside of the ranges, whatever the kernel computed there, and sums begin at zero.
#pragma once

#include "cpu/tiles/gradient_segments.h"
#include "cpu/tiles/odd_products.h"

namespace mk::MK_ISA {

// What the gradients are computed from, and where they go.
template <class F, class Kernel>
struct GradientCall {
  const Lead& lead;
  const SlotView &keys, &values;
  const View &mask, &range;
  double scale;
  const GradientShape<F>& s;
  const GradientViews& out;
  const Kernel& kernel;
};

// The gradients of one batch.
template <class F, class Kernel>
class BatchGradients {
 public:
  BatchGradients(const GradientCall<F, Kernel>& call, int64_t batch, char* memory)
      : s_(call.s),
        lead_(call.lead),
        out_(call.out),
        kernel_(call.kernel),
        range_(call.range),
        scale_(F(call.scale)),
        batch_(batch),
        slots_(call.keys, call.values, call.mask, lead_, batch, s_.N, s_.K, s_.V, true),
        first_keys_(out_.keys && first_visit(out_.keys, lead_, batch)),
        first_values_(out_.values && first_visit(out_.values, lead_, batch)),
        first_mask_(out_.mask && first_visit(out_.mask, lead_, batch)) {
    Arena arena(memory);
    packed_ = arena.take<F>(s_.panel / s_.tile * tile_elements());
    partials_ = arena.take<F>(out_.query ? s_.chunks * s_.panel * s_.KP : 0);
    token_sums_ = arena.take<F>(out_.tokens ? s_.chunks * s_.panel : 0);
    spans_ = arena.take<Span>(range_ ? s_.panel : 0);
    tiles_ = arena.take<TileSpans>(range_ ? s_.panel / s_.tile : 0);
    odd_tokens_ = arena.take<OddRows>(range_ ? s_.panel / s_.tile : 0);
    segments_ = SegmentSums<F>(s_, out_, arena);
  }
  static size_t bytes(const GradientShape<F>& s, const Kernel& kernel, bool ranges) {
    const int64_t tiles = s.panel / s.tile;
    return size_t(tiles * tile_elements(s, kernel) + s.chunks * (s.panel * s.KP + s.panel) + 64) * sizeof(F) +
           size_t(ranges) *
               (size_t(s.panel) * sizeof(Span) + size_t(tiles) * (sizeof(TileSpans) + sizeof(OddRows)) + 3 * 64) +
           SegmentSums<F>::bytes(s);
  }

  void run() const {
    Arena measure;
    ChunkMemory<F>(measure, s_, bool(range_));
    const size_t bytes = measure.used() + kernel_.scratch(s_) + 8 * 64;
    for (int64_t i = 0; i < s_.panels; ++i) {
      const int64_t first = i * s_.panel, tokens = least(s_.panel, s_.tokens - first);
      const Panel panel{first, tokens, div_up(tokens, s_.tile)};
      parallel(panel.tiles, 0, [&](int64_t x, char*) {
        FlushDenormals flush;
        kernel_.pack(batch_, first + x * s_.tile, panel.tile(s_, x), packed_ + x * tile_elements());
        if (range_) pack_ranges(panel, x);
      });
      parallel(s_.segments * s_.chunks, bytes, [&](int64_t task, char* own) {
        FlushDenormals flush;
        add_chunk(panel, task / s_.chunks, task % s_.chunks, Arena(own));
      });
      parallel(segments_.several() ? segments_.blocks() : 0, bytes, [&](int64_t b, char* own) {
        FlushDenormals flush;
        add_segments(panel, b * kSlotBlock, Arena(own));
      });
      if (out_.tokens) store_token_sums(panel);
      if (out_.query) store_queries(panel);
    }
  }

 private:
  // Tokens [first, first + tokens) in so many tiles.
  struct Panel {
    int64_t first, tokens, tiles;
    int64_t tile(const GradientShape<F>& s, int64_t x) const { return least(s.tile, tokens - x * s.tile); }
  };
  // Tiles [first, stop) of a panel.
  struct Segment {
    int64_t first, stop;
  };
  // The part of the sums over slots that a chunk has: dq [panel, KP] and, of the tokens, -dS summed [panel].
  struct Partial {
    F *dq, *tokens;
    bool begun = false;  // has dq been written?
  };

  static int64_t tile_elements(const GradientShape<F>& s, const Kernel& kernel) {
    return round_up(int64_t(kernel.packed(s)), 16);
  }
  int64_t tile_elements() const { return tile_elements(s_, kernel_); }
  int64_t T() const { return s_.tokens / most(lead_.folded(), 1); }

  // The spans of tile x, and which of its packed rows hold numbers that are not finite.
  void pack_ranges(const Panel& panel, int64_t x) const {
    const int64_t t0 = x * s_.tile, n = panel.tile(s_, x);
    tiles_[x] = TileSpans(range_, lead_, batch_, T(), s_.N, panel.first + t0, n, spans_ + t0);
    const F* tile = packed_ + x * tile_elements();
    const F *queries = kernel_.queries(s_, tile), *reads = kernel_.reads(s_, tile);
    OddRows odd;
    for (int64_t t = 0; t < n; ++t) {
      const bool finite = finite_row<F>(queries, t, s_.KP, s_.pairs) && finite_row<F>(reads, t, s_.VP, s_.pairs);
      if (!finite) odd.row[odd.n++] = uint8_t(t);
    }
    odd_tokens_[x] = odd;
  }

  bool any_tile_meets(const Segment& x, int64_t a, int64_t b) const {
    return !range_ ||
           std::any_of(tiles_ + x.first, tiles_ + x.stop, [&](const TileSpans& spans) { return spans.meet(a, b); });
  }

  // The gradients of the slots of a chunk, summed over the tokens of a segment, and its partial d_query.
  void add_chunk(const Panel& panel, int64_t segment, int64_t c, Arena arena) const {
    const ChunkMemory<F> w(arena, s_, bool(range_));
    const Segment x{least(segment * s_.span, panel.tiles), least((segment + 1) * s_.span, panel.tiles)};
    const int64_t t0 = x.first * s_.tile, n = (x.stop - x.first) * s_.tile;
    Partial part{out_.query ? partials_ + c * s_.panel * s_.KP : nullptr,
                 out_.tokens ? token_sums_ + c * s_.panel : nullptr};
    const auto clear = [&] { std::memset(part.dq + t0 * s_.KP, 0, size_t(n * s_.KP) * sizeof(F)); };
    if (part.tokens != nullptr) std::memset(part.tokens + t0, 0, size_t(n) * sizeof(F));
    if (range_ && part.dq != nullptr) clear();
    part.begun = bool(range_);
    const int64_t hi = s_.begin(c + 1);
    for (int64_t i = s_.begin(c); i < hi; i += kSlotBlock) {
      const int64_t count = least(kSlotBlock, hi - i);
      SlotBlock<F> block;
      if (x.first < x.stop && any_tile_meets(x, i, i + count)) {
        block = gradient_block(slots_, s_, i, count, w.buffers, w.keys2);
      }
      for (int64_t j = 0; j < block.n; ++j) w.dm[j] = 0;
      if (range_) add_ranged(panel, x, i, count, block, w, part, arena);
      for (int64_t y = x.first; y < x.stop && block.n > 0 && !range_; ++y) {
        add_tile(panel, y, y > x.first, i, block, w, part, arena);
      }
      part.begun = part.begun || block.n > 0;
      if (segments_.several()) segments_.keep(segment, i, block, w);
      else store_block(panel.first == 0, i, count, block, w);
    }
    if (part.dq != nullptr && !part.begun) clear();
  }

  // Stores the sums of a block of slots over all segments.
  void add_segments(const Panel& panel, int64_t first, Arena arena) const {
    const ChunkMemory<F> w(arena, s_, bool(range_));
    const int64_t count = least(kSlotBlock, s_.N - first);
    SlotBlock<F> block;
    if (segments_.add_up(first, w) > 0) block = slots_.list(first, count, w.buffers);
    store_block(panel.first == 0, first, count, block, w);
  }

  // P and D = dS of a block of slots, from `first` on, and tile x of the panel; then their products and sums. `more`:
  // dk and dv have been begun.
  void add_tile(const Panel& panel, int64_t x, bool more, int64_t first, const SlotBlock<F>& block,
                const ChunkMemory<F>& w, const Partial& part, Arena& arena) const {
    const int64_t t0 = x * s_.tile, n = panel.tile(s_, x), L = s_.few ? n : round_up(n, kLanes<F>);
    const TileStrides<F> at = s_.few ? TileStrides<F>{kSlotBlock, 1} : TileStrides<F>{1, L};
    const F* tile = packed_ + x * tile_elements();
    kernel_.tile(batch_, first, block, panel.first + t0, n, tile, w.P, w.D, at, arena);
    if (out_.mask || out_.tokens) {
      add_sums<F>(w.D, at, n, block.n, w.dm, part.tokens == nullptr ? nullptr : part.tokens + t0);
    }
    F* dq = part.dq == nullptr ? nullptr : part.dq + t0 * s_.KP;
    const ProductRows<F> rows{kernel_.queries(s_, tile), kernel_.reads(s_, tile), w.keys2, w.dk, w.dv};
    multiply(block, n, L, at, rows, w, more, dq, part.begun);
  }

  // All tiles of tokens with ranges, and a block of slots: dk and dv begin at zero.
  void add_ranged(const Panel& panel, const Segment& segment, int64_t first, int64_t count, const SlotBlock<F>& block,
                  const ChunkMemory<F>& w, const Partial& part, Arena& arena) const {
    if (block.n == 0) return;
    if (out_.keys) std::memset(w.dk, 0, size_t(block.n * s_.KP) * sizeof(F));
    if (out_.values) std::memset(w.dv, 0, size_t(block.n * s_.VP) * sizeof(F));
    const OddProducts<F> products(s_, slots_, w);
    const OddRows odd = part.dq == nullptr ? OddRows{} : products.find_keys(block, first);
    for (int64_t x = segment.first; x < segment.stop; ++x) {
      const TileSpans& spans = tiles_[x];
      if (!spans.meet(first, first + count)) continue;
      RowSpan r = rows_within(block, first, spans.within(first, first + count));
      if (s_.pairs) r.first = r.first / 2 * 2;  // rows of keys are pairs of slots
      if (r.count() > 0) add_ranged_tile(panel, x, r, BlockPart<F>(block, first, r), odd, w, part, arena);
    }
  }

  // As add_tile, of the rows `r` of a block.
  void add_ranged_tile(const Panel& panel, int64_t x, RowSpan r, BlockPart<F> part, const OddRows& odd,
                       const ChunkMemory<F>& w, const Partial& sums, Arena& arena) const {
    const int64_t t0 = x * s_.tile, n = panel.tile(s_, x), L = s_.few ? n : round_up(n, kLanes<F>);
    const TileStrides<F> at = s_.few ? TileStrides<F>{kSlotBlock, 1} : TileStrides<F>{1, L};
    const F* tile = packed_ + x * tile_elements();
    const TileSpans& spans = tiles_[x];
    const OddProducts<F> products(s_, slots_, w);
    kernel_.tile(batch_, part.first, part.block, panel.first + t0, n, tile, w.P, w.D, at, arena);
    if (!spans.hold(part.begin(), part.end())) {
      if (out_.values) close_weights(spans, part, L, w.P);
      close_weights(spans, part, L, w.D);
    }
    if (out_.mask || out_.tokens) {
      add_sums<F>(w.D, at, n, part.block.n, w.dm + r.first, sums.tokens == nullptr ? nullptr : sums.tokens + t0);
    }
    F* dq = sums.dq == nullptr ? nullptr : sums.dq + t0 * s_.KP;
    const ProductRows<F> rows{kernel_.queries(s_, tile), kernel_.reads(s_, tile), w.keys2 + r.first / 2 * s_.KP,
                              w.dk + r.first * s_.KP, w.dv + r.first * s_.VP};
    const ProductRows<F> finite = odd_tokens_[x].n == 0 ? rows : products.finite_tokens(rows, odd_tokens_[x], n);
    SlotBlock<F> block = part.block;
    if (odd.n > 0 && !s_.pairs) block.keys = w.keys + r.first * s_.KP, block.ks = s_.KP;
    multiply(block, n, L, at, finite, w, true, dq, true);
    const OddTile<F> tile_of_odd{part, r, spans, n, L, at};
    if (odd_tokens_[x].n > 0) {
      products.add_tokens(tile_of_odd, odd_tokens_[x], rows, bool(out_.keys), bool(out_.values));
    }
    if (dq != nullptr) products.add_keys(tile_of_odd, odd, dq);
  }
  void close_weights(const TileSpans& spans, const BlockPart<F>& part, int64_t L, F* S) const {
    if (s_.few) close_rows<F>(spans, part.block, part.first, F(0), S);
    else close_columns<F>(spans, part.block, part.first, L, F(0), S);
  }

  // dv += P^T reads and dk += D^T queries of the tile, dq += D keys. `more`, `begun`: there are sums already.
  void multiply(const SlotBlock<F>& block, int64_t n, int64_t L, TileStrides<F> at, const ProductRows<F>& rows,
                const ChunkMemory<F>& w, bool more, F* dq, bool begun) const {
    if constexpr (kHasPairs<F>) {
      if (s_.pairs) return multiply_pairs(block, n, L, rows, w, more, dq, begun);
    }
    if (out_.values) gemm(Gemm<F>{block.n, s_.VP, n, w.P, at.is, at.ts, rows.reads, s_.VP, rows.dv, s_.VP, more});
    if (out_.keys) gemm(Gemm<F>{block.n, s_.KP, n, w.D, at.is, at.ts, rows.queries, s_.KP, rows.dk, s_.KP, more});
    if (dq != nullptr) gemm(Gemm<F>{n, s_.KP, block.n, w.D, at.ts, at.is, block.keys, block.ks, dq, s_.KP, begun});
  }

  // The same with pairs of bfloat16; P and D become pairs of tokens.
  void multiply_pairs(const SlotBlock<F>& block, int64_t n, int64_t L, const ProductRows<F>& rows,
                      const ChunkMemory<F>& w, bool more, F* dq, bool begun) const
    requires kHasPairs<F>
  {
    const int64_t t2 = div_up(n, 2), L2 = L / 2;
    if (dq != nullptr) pair_slots(w.D, block.n, L, w.D2);
    pair_tokens(w.P, block.n, L);
    pair_tokens(w.D, block.n, L);
    if (out_.values) {
      gemm_pairs({block.n, s_.VP, t2, w.P, L2, 1, rows.reads, s_.VP, rows.dv, s_.VP, more}, 1);
    }
    if (out_.keys) {
      gemm_pairs({block.n, s_.KP, t2, w.D, L2, 1, rows.queries, s_.KP, rows.dk, s_.KP, more}, 1);
    }
    if (dq != nullptr) {
      gemm_pairs({n, s_.KP, div_up(block.n, 2), w.D2, 1, L, rows.keys2, s_.KP, dq, s_.KP, begun}, 1);
    }
  }

  // Stores dk, dv and dm of slots [first, first + count), or adds them to what earlier panels or batches stored.
  void store_block(bool start, int64_t first, int64_t count, const SlotBlock<F>& block, const ChunkMemory<F>& w) const {
    if (out_.keys) {
      scatter_rows<F>(out_.keys, lead_, batch_, start && first_keys_, first, count, block, w.dk, s_.KP, s_.K, scale_,
                      s_.N * s_.K * int64_t(sizeof(F)));
    }
    if (out_.values) {
      scatter_rows<F>(out_.values, lead_, batch_, start && first_values_, first, count, block, w.dv, s_.VP, s_.V, F(1),
                      s_.N * s_.V * int64_t(sizeof(F)));
    }
    if (out_.mask) {
      scatter_rows<F>(out_.mask, lead_, batch_, start && first_mask_, first, count, block, w.dm, 1, 1, F(1));
    }
  }

  // tokens[t] = -sum_i dS[t, i]: adds up the chunks in order.
  void store_token_sums(const Panel& panel) const {
    const TokenRows rows(out_.tokens, lead_, batch_, T());
    for (int64_t t = 0; t < panel.tokens; ++t) {
      F total = 0;
      for (int64_t g = 0; g < s_.chunks; ++g) total -= token_sums_[g * s_.panel + t];
      *reinterpret_cast<F*>(rows.row(panel.first + t)) = total;
    }
  }

  // d_query = scale dS K: adds up the chunks in order.
  void store_queries(const Panel& panel) const {
    const TokenRows rows(out_.query, lead_, batch_, T());
    parallel(panel.tiles, size_t(s_.KP) * sizeof(F), [&](int64_t x, char* own) {
      F* sum = reinterpret_cast<F*>(own);
      for (int64_t t = x * s_.tile; t < least((x + 1) * s_.tile, panel.tokens); ++t) {
        for (int64_t c = 0; c < s_.KP; ++c) sum[c] = 0;
        for (int64_t g = 0; g < s_.chunks; ++g) {
          const F* part = partials_ + (g * s_.panel + t) * s_.KP;
          for (int64_t c = 0; c < s_.KP; ++c) sum[c] += part[c];
        }
        F* row = reinterpret_cast<F*>(rows.row(panel.first + t));
        for (int64_t c = 0; c < s_.K; ++c) row[c] = scale_ * sum[c];
      }
    });
  }

  const GradientShape<F>& s_;
  const Lead& lead_;
  const GradientViews& out_;
  const Kernel& kernel_;
  const View& range_;
  F scale_;
  int64_t batch_;
  Slots<F> slots_;
  bool first_keys_, first_values_, first_mask_;
  F *packed_, *partials_, *token_sums_;
  SegmentSums<F> segments_;
  Span* spans_;          // of the tokens of a panel
  TileSpans* tiles_;     // of its tiles
  OddRows* odd_tokens_;  // of its tiles: tokens whose query or gradient is not finite
};

// Runs the scheme above. `Kernel` has what differs between ops:
//   size_t packed(shape)                 elements of F that it packs per tile
//   void pack(batch, t0, n, F* tile)     packs n tokens
//   size_t scratch(shape)                its own scratch bytes per task
//   void tile(batch, first, count, block, t0, n, const F* packed, F* P, F* D, TileStrides)
//                                        computes P (if wanted) and D = dS
//   const F* queries(packed), const F* reads(packed)
//                                        padded rows [n][KP] and [n][VP] in the packed tile; of pairs [n / 2] of them
template <class F, class Kernel>
void score_gradients(const Lead& lead, const SlotView& keys, const SlotView& values, const View& mask,
                     const View& range, double scale, const GradientShape<F>& s, const GradientViews& out,
                     const Kernel& kernel) {
  const GradientCall<F, Kernel> call{lead, keys, values, mask, range, scale, s, out, kernel};
  each_batch(s.batches, BatchGradients<F, Kernel>::bytes(s, kernel, bool(range)), lead,
             {&out.keys, &out.values, &out.mask},
             [&](int64_t batch, char* memory) { BatchGradients<F, Kernel>(call, batch, memory).run(); });
}

}  // namespace mk::MK_ISA
