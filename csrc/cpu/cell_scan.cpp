// cell_scan:  [zf, zi, zc] = x_t + W h_{t-1},  h_t = f h_{t-1} + i c,  f = sigmoid(zf), i = sigmoid(zi), c = tanh(zc)
// backward, g = dh_t + the gradient from later tokens:
//   dzf = g h_{t-1} f (1 - f),  dzi = g c i (1 - i),  dzc = g i (1 - c^2),  g <- g f + W^T dz,
//   dx_t = dz,  dW = sum dz h_{t-1}^T
//
// Streams are rows, channels are lanes. A token is a product [streams, D] x [D, 3D] and a few element-wise operations.
// The weight is packed once in strips, each of its three blocks padded to whole registers, and stays in cache; several
// streams share each pass over it. Groups of streams run in parallel. With few streams the bound is reading the weight
// from L2, with many it is multiply-adds.
//
// In the backward all states are known: one product recomputes the gates of a chunk of tokens, and only g is a
// recurrence. dW is one product per chunk. Each task sums its own dW, and those of the tasks are added in order.
#include "params/cell_scan.h"

#include <algorithm>

#include "cpu/tiles/parallel.h"
#include "cpu/tiles/scores.h"
#include "cpu/tiles/tanh.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t kLeastGroups = 4;  // or a multiple of it, so that two or four threads have the same work
constexpr int64_t kMostParts = 8;    // partial dW per weight
constexpr int64_t kChunkRows = 96;

// Streams that share a pass over the weight, and the registers of a strip of it: a tile of the product
// (tiles/gemm.cpp). The more rows in a tile, the less often the weight comes from L2. Where a strip fits L1, two tiles
// share it. Zen 4, D=256 T=256, two threads, against groups of 12 that read the whole weight row by row: 32 streams
// 21.6 -> 17.6 ms, backward 63 -> 52; 16 streams 11.0 -> 8.6; one stream the same (92% of what a loop reads from L2).
#if defined(__AVX512F__)
constexpr int64_t kMostRows = 8;
constexpr int64_t strip_registers(int64_t rows) { return rows <= 3 ? 8 : rows <= 6 ? 4 : 3; }
#elif defined(__aarch64__)
constexpr int64_t kMostRows = 12;
constexpr int64_t strip_registers(int64_t rows) { return rows <= 3 ? 8 : 4; }
#else  // 16 registers
constexpr int64_t kMostRows = 12;
constexpr int64_t strip_registers(int64_t) { return 2; }
#endif

template <class F>
struct Shape {
  int64_t D, DP, L, streams, rows, groups, strip;  // lanes of a strip

  explicit Shape(const CellScan& p) : D(p.D), DP(Slots<F>::padded(p.D)), L(3 * DP), streams(p.lead.folded()) {
    rows = most(1, div_up(streams, round_up(div_up(streams, kMostRows), kLeastGroups)));
    groups = div_up(streams, rows);
    strip = strip_registers(rows) * kLanes<F>;
  }
};

// A matrix [k][lanes] in strips of lanes, each of which is read as one stream.
template <class F>
struct Strips {
  F* data;
  int64_t k, lanes, width;

  int64_t width_at(int64_t lane) const { return least(width, lanes - lane); }
  F* row(int64_t lane, int64_t r) const { return data + lane * k + r * width_at(lane); }  // `lane` begins a strip
};

// c[M][lanes] += a[M][k] b
template <class F>
void multiply(int64_t M, const F* a, int64_t lda, const Strips<F>& b, F* c) {
  for (int64_t lane = 0; lane < b.lanes; lane += b.width) {
    const int64_t width = b.width_at(lane);
    gemm(Gemm<F>{M, width, b.k, a, lda, 1, b.row(lane, 0), width, c + lane, b.lanes, true});
  }
}

// One block of D numbers per gate, each padded to whole registers.
template <class F>
void read_blocks(const char* row, DType dtype, const Shape<F>& s, F* z) {
  for (int64_t g = 0; g < 3; ++g, z += s.DP) {
    read_row<F>(row + g * s.D * size_of(dtype), dtype, s.D, z);
    for (int64_t d = s.D; d < s.DP; ++d) z[d] = 0;
  }
}

// The packed weights of all batches: the transpose [D][3 DP], and if wanted the rows [3 DP][DP]. Parallel over blocks
// of columns of the weight.
template <class F>
class Weights {
 public:
  Weights(const CellScan& p, const Shape<F>& s, bool with_rows)
      : columns_(p.lead.batches() * s.D * s.L), rows_(with_rows ? p.lead.batches() * s.L * s.DP : 0), s_(s) {
    const int64_t blocks = div_up(s.D, s.strip);
    parallel(p.lead.batches() * blocks, size_t(kLanes<F> * s.strip) * sizeof(F), [&](int64_t task, char* memory) {
      const int64_t batch = task / blocks, k = task % blocks * s.strip;
      pack(p, batch, k, least(s.strip, s.D - k), with_rows, reinterpret_cast<F*>(memory));
    });
  }
  Strips<F> columns(int64_t batch) { return {columns_.data() + batch * s_.D * s_.L, s_.D, s_.L, s_.strip}; }
  Strips<F> rows(int64_t batch) { return {rows_.data() + batch * s_.L * s_.DP, s_.L, s_.DP, s_.strip}; }

 private:
  // Columns [k, k + count) of the weight, which are a strip of its rows.
  void pack(const CellScan& p, int64_t batch, int64_t k, int64_t count, bool with_rows, F* buffer) {
    const char* base = p.weight.batch(p.lead, batch) + k * size_of(p.weight.dtype);
    const auto row = [&](int64_t r, F* to) {
      const int64_t d = r % s_.DP;
      if (d < s_.D) read_row<F>(base + (r / s_.DP * s_.D + d) * p.weight.row, p.weight.dtype, count, to);
      else std::fill_n(to, count, F(0));
      return to;
    };
    const Strips<F> columns = this->columns(batch);
    for (int64_t lane = 0; lane < s_.L; lane += s_.strip) {
      const int64_t width = columns.width_at(lane);
      pack_lanes<F>(width, width, count, F(1), buffer, columns.row(lane, k),
                    [&](int64_t r, F* to) { return row(lane + r, to); });
    }
    if (!with_rows) return;
    const Strips<F> rows = this->rows(batch);
    for (int64_t r = 0; r < s_.L; ++r) std::fill(row(r, rows.row(k, r)) + count, rows.row(k, r + 1), F(0));
  }

  Buffer<F> columns_, rows_;
  Shape<F> s_;
};

template <class F>
void read_initial(const CellScan& p, const Shape<F>& s, int64_t batch, int64_t stream, F* h) {
  const TokenRows initial(p.initial, p.lead, batch, 1);
  if (initial) read_row<F>(initial.row(stream), initial.dtype, s.D, h);
  for (int64_t d = initial ? s.D : 0; d < s.DP; ++d) h[d] = 0;
}

template <class F>
void forward(const CellScan& p) {
  constexpr int W = kLanes<F>;
  const Shape<F> s(p);
  Weights<F> weights(p, s, false);
  Arena measure;
  measure.take<F>(s.rows * s.DP), measure.take<F>(s.rows * s.L);
  parallel(p.lead.batches() * s.groups, measure.used(), [&](int64_t task, char* memory) {
    FlushDenormals flush;
    const int64_t batch = task / s.groups, first = task % s.groups * s.rows, n = least(s.rows, s.streams - first);
    const TokenRows inputs(p.inputs, p.lead, batch, p.T), states(p.states, p.lead, batch, p.T);
    const Strips<F> weight = weights.columns(batch);
    Arena arena(memory);
    F* h = arena.take<F>(s.rows * s.DP);
    F* z = arena.take<F>(s.rows * s.L);
    for (int64_t r = 0; r < n; ++r) read_initial<F>(p, s, batch, first + r, h + r * s.DP);
    for (int64_t t = 0; t < p.T; ++t) {
      for (int64_t r = 0; r < n; ++r) read_blocks<F>(inputs.row((first + r) * p.T + t), inputs.dtype, s, z + r * s.L);
      multiply(n, h, s.DP, weight, z);
      for (int64_t r = 0; r < n; ++r) {
        F *state = h + r * s.DP, *gate = z + r * s.L;
        for (int64_t d = 0; d < s.DP; d += W) {
          Vec<F> f, i, rest;
          sigmoid<F>(load<F>(gate + d), f, rest);
          sigmoid<F>(load<F>(gate + s.DP + d), i, rest);
          store<F>(state + d, f * load<F>(state + d) + i * tanh<F>(load<F>(gate + 2 * s.DP + d)));
        }
        write_row<F>(state, s.D, states.dtype, states.row((first + r) * p.T + t));
      }
    }
  });
}

// A chunk of tokens for a group of streams: row t * n + r is token t of stream r.
template <class F>
struct Chunk {
  F *before, *z;        // h_{t-1} [rows][DP]; gates, then dz [rows][L]
  F *g, *d;             // [streams][DP] and a row
  F* weight = nullptr;  // dW [L][DP], if wanted
  explicit Chunk(const Shape<F>& s, int64_t tokens, Arena& arena)
      : before(arena.take<F>(tokens * s.rows * s.DP)),
        z(arena.take<F>(tokens * s.rows * s.L)),
        g(arena.take<F>(s.rows * s.DP)),
        d(arena.take<F>(s.DP)) {}
};

// From g, the gradient from later tokens, and the gates in z: computes dz and the g of the token before.
template <class F>
void step_back(const Shape<F>& s, const F* dh, const F* before, F* z, F* g) {
  for (int64_t x = 0; x < s.DP; x += kLanes<F>) {
    Vec<F> f, f_rest, i, i_rest;
    sigmoid<F>(load<F>(z + x), f, f_rest);
    sigmoid<F>(load<F>(z + s.DP + x), i, i_rest);
    const Vec<F> c = tanh<F>(load<F>(z + 2 * s.DP + x)), all = load<F>(g + x) + load<F>(dh + x);
    store<F>(z + x, all * load<F>(before + x) * (f * f_rest));
    store<F>(z + s.DP + x, all * c * (i * i_rest));
    store<F>(z + 2 * s.DP + x, all * i * ((F(1) - c) * (F(1) + c)));
    store<F>(g + x, all * f);
  }
}

template <class F>
void group_back(const CellScanBackward& b, const Shape<F>& s, int64_t batch, int64_t first, int64_t tokens,
                const Strips<F>& columns, const Strips<F>& rows, const Chunk<F>& c) {
  const CellScan& p = b.forward;
  const int64_t n = least(s.rows, s.streams - first);
  const TokenRows inputs(p.inputs, p.lead, batch, p.T), states(p.states, p.lead, batch, p.T);
  const TokenRows d_states(b.d_states, p.lead, batch, p.T), d_inputs(b.d_inputs, p.lead, batch, p.T);
  std::memset(c.g, 0, size_t(n * s.DP) * sizeof(F));
  for (int64_t d = s.D; d < s.DP; ++d) c.d[d] = 0;
  for (int64_t t0 = (div_up(p.T, tokens) - 1) * tokens; t0 >= 0; t0 -= tokens) {
    const int64_t count = least(tokens, p.T - t0);
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t r = 0; r < n; ++r) {
        const int64_t at = (first + r) * p.T + t0 + t;
        F* h = c.before + (t * n + r) * s.DP;
        if (t0 + t == 0) {
          read_initial<F>(p, s, batch, first + r, h);
        } else {
          read_row<F>(states.row(at - 1), states.dtype, s.D, h);
          for (int64_t d = s.D; d < s.DP; ++d) h[d] = 0;
        }
        read_blocks<F>(inputs.row(at), inputs.dtype, s, c.z + (t * n + r) * s.L);
      }
    }
    multiply(count * n, c.before, s.DP, columns, c.z);
    for (int64_t t = count; t-- > 0;) {
      F* z = c.z + t * n * s.L;
      for (int64_t r = 0; r < n; ++r) {
        const int64_t at = (first + r) * p.T + t0 + t;
        read_row<F>(d_states.row(at), d_states.dtype, s.D, c.d);
        step_back<F>(s, c.d, c.before + (t * n + r) * s.DP, z + r * s.L, c.g + r * s.DP);
        for (int64_t g = 0; g < 3 && d_inputs; ++g) {
          std::memcpy(d_inputs.row(at) + g * s.D * int64_t(sizeof(F)), z + r * s.L + g * s.DP, size_t(s.D) * sizeof(F));
        }
      }
      multiply(n, z, s.L, rows, c.g);
    }
    if (b.d_weight) gemm(Gemm<F>{s.L, s.DP, count * n, c.z, 1, s.L, c.before, s.DP, c.weight, s.DP, true});
  }
  if (!b.d_initial) return;
  const TokenRows d_initial(b.d_initial, p.lead, batch, 1);
  for (int64_t r = 0; r < n; ++r) {
    std::memcpy(d_initial.row(first + r), c.g + r * s.DP, size_t(s.D) * sizeof(F));
  }
}

template <class F>
void backward(const CellScanBackward& b) {
  const CellScan& p = b.forward;
  const Shape<F> s(p);
  const int64_t parts = least(kMostParts, s.groups), groups = div_up(s.groups, parts), batches = p.lead.batches();
  const int64_t tokens = most(1, kChunkRows / s.rows), size = s.L * s.DP;
  Weights<F> weights(p, s, true);
  Buffer<F> partial(b.d_weight ? batches * parts * size : 0);
  Arena measure;
  const Chunk<F> shape(s, tokens, measure);
  parallel(batches * parts, measure.used(), [&](int64_t task, char* memory) {
    FlushDenormals flush;
    Arena arena(memory);
    Chunk<F> chunk(s, tokens, arena);
    const int64_t batch = task / parts, g0 = task % parts * groups;
    if (b.d_weight) {
      chunk.weight = partial.data() + task * size;
      std::memset(chunk.weight, 0, size_t(size) * sizeof(F));
    }
    for (int64_t g = g0; g < least(g0 + groups, s.groups); ++g) {
      group_back<F>(b, s, batch, g * s.rows, tokens, weights.columns(batch), weights.rows(batch), chunk);
    }
  });
  if (!b.d_weight) return;
  parallel(batches * 3 * s.D, 0, [&](int64_t task, char*) {
    const int64_t batch = task / (3 * s.D), row = task % (3 * s.D);
    F* out = reinterpret_cast<F*>(b.d_weight.batch(p.lead, batch) + row * b.d_weight.row);
    const F* from = partial.data() + batch * parts * size + (row / s.D * s.DP + row % s.D) * s.DP;
    for (int64_t d = 0; d < s.D; ++d) {
      F sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += from[part * size + d];
      out[d] = sum;
    }
  });
}

}  // namespace

void cell_scan(const CellScan& p) {
  if (p.inputs.dtype == DType::f64) forward<double>(p);
  else forward<float>(p);
}

void cell_scan_backward(const CellScanBackward& b) {
  if (b.forward.inputs.dtype == DType::f64) backward<double>(b);
  else backward<float>(b);
}

}  // namespace mk::MK_ISA
