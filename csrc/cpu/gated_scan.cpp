// gated_scan:  h_t = f_t h_{t-1} + u_t
// backward:    g_t = dh_t + f_{t+1} g_{t+1},  du_t = g_t,  df_t = g_t h_{t-1},  dh_0 = f_1 g_1
//
// Lanes are channels. A strip is some channels of one stream; it is walked row by row with its state in L1. Every
// number is read once and every result is written once, so the bound is bandwidth. Strips run in parallel.
//
// If there are few strips (few streams of few channels), the tokens are split into parts too. Each part is first
// scanned from zero, which gives its last state and the product of its gates. From these the states at the splits
// follow one after the other. Then each part is scanned from its true state. Splits depend on shapes only.
#include "params/gated_scan.h"

#include "cpu/tiles/parallel.h"
#include "cpu/tiles/scores.h"
#include "cpu/tiles/streaming.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t kStrips = 8;         // strips are split until there are this many, enough for most processors
constexpr int64_t kStripBytes = 4096;  // of a row: one page, which fits L1 with its state
constexpr int64_t kLeastBytes = 256;
constexpr int64_t kPartTokens = 512;

template <class F>
struct Cuts {
  int64_t streams, width, strips, part, parts;

  explicit Cuts(const GatedScan& p) : streams(p.lead.folded()) {
    const int64_t item = int64_t(sizeof(F)),
                  wanted = round_up(div_up(p.D, div_up(kStrips, most(streams, 1))), kLanes<F>);
    width = most(kLeastBytes / item, least(kStripBytes / item, wanted));
    strips = streams * div_up(p.D, width);
    parts = strips >= kStrips / 2 ? 1 : most(1, least(kStrips / most(strips, 1), p.T / kPartTokens));
    part = div_up(p.T, parts);
    parts = div_up(p.T, most(part, 1));
  }
};

// The rows of one stream, beginning at one channel.
template <class F>
struct Strip {
  char* base = nullptr;
  DType dtype = kOwn<F>;
  int64_t stride = 0;

  Strip(const View& v, const Lead& lead, int64_t T, int64_t stream, int64_t first) {
    if (!v) return;
    const TokenRows rows(v, lead, 0, T);
    base = rows.row(stream * T) + first * size_of(v.dtype);
    dtype = v.dtype, stride = rows.stride;
  }
  explicit operator bool() const { return base != nullptr; }
  // Do results of so many numbers in this strip take non-temporal stores?
  bool is_non_temporal(int64_t numbers) const {
    return base != nullptr && dtype == kOwn<F> && MK_ISA::is_non_temporal(base, stride, numbers * int64_t(sizeof(F)));
  }
  char* at(int64_t t) const { return base + t * stride; }
  const F* row(int64_t t, int64_t n, F* buffer) const { return row_as<F>(at(t), dtype, n, buffer); }
  // The row itself if it has dtype F, else `buffer`, which save() stores to it.
  F* open(int64_t t, F* buffer) const { return dtype == kOwn<F> ? reinterpret_cast<F*>(at(t)) : buffer; }
  void save(const F* x, int64_t t, int64_t n) const {
    if (dtype != kOwn<F>) write_row<F>(x, n, dtype, at(t));
  }
};

template <class F>
struct Whole {
  MK_INLINE Vec<F> operator()(const F* p) const { return load<F>(p); }
  MK_INLINE void operator()(F* p, Vec<F> v) const { store<F>(p, v); }
  template <class Put>
  MK_INLINE void put(Put put, F* p, Vec<F> v) const {
    put(p, v);
  }
};
template <class F>
struct First {
  int64_t n;
  MK_INLINE Vec<F> operator()(const F* p) const { return load_first<F>(p, n); }
  MK_INLINE void operator()(F* p, Vec<F> v) const { std::memcpy(p, &v, size_t(n) * sizeof(F)); }
  template <class Put>
  MK_INLINE void put(Put, F* p, Vec<F> v) const {
    (*this)(p, v);
  }
};

inline int64_t numbers(const GatedScan& p) { return p.lead.folded() * p.T * p.D; }

// Calls body(c, x) for every register of n numbers, the last of which may be partial. x(p) loads, x(p, v) stores,
// x.put(put, p, v) stores with `put`.
template <class F, class Body>
MK_INLINE void each_register(int64_t n, Body&& body) {
  int64_t c = 0;
  for (; c + kLanes<F> <= n; c += kLanes<F>) body(c, Whole<F>{});
  if (c < n) body(c, First<F>{n - c});
}

template <class F>
struct Forward {
  const GatedScan& p;
  Strip<F> forget, update, states;
  int64_t n;
  F *f_buffer, *u_buffer;

  Forward(const GatedScan& scan, int64_t stream, int64_t first, int64_t count, Arena& arena)
      : p(scan),
        forget(p.forget, p.lead, p.T, stream, first),
        update(p.update, p.lead, p.T, stream, first),
        states(p.states, p.lead, p.T, stream, first),
        n(count),
        f_buffer(arena.take<F>(count)),
        u_buffer(arena.take<F>(count)) {}

  static void start(const GatedScan& p, int64_t stream, int64_t first, int64_t n, F* h) {
    if (p.initial) read_row<F>(Strip<F>(p.initial, p.lead, 1, stream, first).base, p.initial.dtype, n, h);
    else std::memset(h, 0, size_t(n) * sizeof(F));
  }
  // Advances h through [t0, t1), and `kept`, the factor on the state at t0.
  void pass(int64_t t0, int64_t t1, F* h, F* kept) const {
    for (int64_t t = t0; t < t1; ++t) {
      const F *f = forget.row(t, n, f_buffer), *u = update.row(t, n, u_buffer);
      each_register<F>(n, [&](int64_t c, auto x) {
        const Vec<F> gate = x(f + c);
        x(h + c, gate * x(h + c) + x(u + c));
        x(kept + c, gate * x(kept + c));
      });
    }
  }
  void write(int64_t t0, int64_t t1, F* h) const {
    with_stores(states.is_non_temporal(numbers(p)), [&](auto put) {
      for (int64_t t = t0; t < t1; ++t) {
        const F *f = forget.row(t, n, f_buffer), *u = update.row(t, n, u_buffer);
        F* out = states.open(t, u_buffer);
        each_register<F>(n, [&](int64_t c, auto x) {
          const Vec<F> next = x(f + c) * x(h + c) + x(u + c);
          x(h + c, next), x.put(put, out + c, next);
        });
        states.save(out, t, n);
      }
    });
  }
};

// h is the gradient from later tokens, f_{t+1} g_{t+1}; after the first token it is dh_0.
template <class F>
struct Backward {
  const GatedScan& p;
  Strip<F> forget, states, d_states, d_forget, d_update;
  int64_t n;
  F *f_buffer, *d_buffer, *h_buffer, *before;

  Backward(const GatedScanBackward& b, int64_t stream, int64_t first, int64_t count, Arena& arena)
      : p(b.forward),
        forget(p.forget, p.lead, p.T, stream, first),
        states(p.states, p.lead, p.T, stream, first),
        d_states(b.d_states, p.lead, p.T, stream, first),
        d_forget(b.d_forget, p.lead, p.T, stream, first),
        d_update(b.d_update, p.lead, p.T, stream, first),
        n(count),
        f_buffer(arena.take<F>(count)),
        d_buffer(arena.take<F>(count)),
        h_buffer(arena.take<F>(count)),
        before(arena.take<F>(count)) {
    Forward<F>::start(p, stream, first, n, before);
  }

  void pass(int64_t t0, int64_t t1, F* h, F* kept) const {
    for (int64_t t = t1; t-- > t0;) {
      const F *f = forget.row(t, n, f_buffer), *d = d_states.row(t, n, d_buffer);
      each_register<F>(n, [&](int64_t c, auto x) {
        const Vec<F> gate = x(f + c);
        x(h + c, gate * (x(d + c) + x(h + c)));
        x(kept + c, gate * x(kept + c));
      });
    }
  }
  void write(int64_t t0, int64_t t1, F* h) const {
    const bool non_temporal = d_forget.is_non_temporal(numbers(p)) && d_update.is_non_temporal(numbers(p));
    with_stores(non_temporal, [&](auto put) {
      for (int64_t t = t1; t-- > t0;) {
        const F *f = forget.row(t, n, f_buffer), *d = d_states.row(t, n, d_buffer);
        const F* old = d_forget && t > 0 ? states.row(t - 1, n, h_buffer) : before;
        F* df = d_forget ? reinterpret_cast<F*>(d_forget.at(t)) : h_buffer;
        F* du = d_update ? reinterpret_cast<F*>(d_update.at(t)) : d_buffer;
        each_register<F>(n, [&](int64_t c, auto x) {
          const Vec<F> g = x(d + c) + x(h + c);
          x(h + c, x(f + c) * g);
          x.put(put, df + c, g * x(old + c));
          x.put(put, du + c, g);
        });
      }
    });
  }
};

// Runs over strips, and over parts of them if there are few. `make(stream, first, n, arena)` returns an object with
// pass() and write(); `start` sets the state before the first part, `finish` takes the state after the last. `reverse`
// walks from the last part to the first.
template <class F, class Make, class Start, class Finish>
void scan(const GatedScan& p, bool reverse, Make&& make, Start&& start, Finish&& finish) {
  const Cuts<F> cuts(p);
  const int64_t blocks = div_up(p.D, cuts.width), W = cuts.width;
  auto strip = [&](int64_t i, auto&& body) {
    const int64_t first = i % blocks * W;
    body(i / blocks, first, least(W, p.D - first));
  };
  Arena measure;
  for (int i = 0; i < 6; ++i) measure.take<F>(W);
  const size_t bytes = measure.used();
  if (cuts.parts <= 1) {
    parallel(
        cuts.strips, bytes,
        [&](int64_t i, char* memory) {
          FlushDenormals flush;
          strip(i, [&](int64_t stream, int64_t first, int64_t n) {
            Arena arena(memory);
            F* h = arena.take<F>(n);
            start(stream, first, n, h);
            make(stream, first, n, arena).write(0, p.T, h);
            finish(stream, first, n, h);
          });
        },
        3 * numbers(p) * int64_t(sizeof(F)));
    return;
  }
  // [strip][part]: the last state of a part scanned from zero, and the product of its gates
  Buffer<F> carried(cuts.strips * cuts.parts * 2 * W);
  auto place = [&](int64_t i, int64_t part) { return carried.data() + (i * cuts.parts + part) * 2 * W; };
  auto range = [&](int64_t part, auto&& body) { body(part * cuts.part, least((part + 1) * cuts.part, p.T)); };
  parallel(cuts.strips * cuts.parts, bytes, [&](int64_t task, char* memory) {
    FlushDenormals flush;
    const int64_t part = task % cuts.parts;
    F *h = place(task / cuts.parts, part), *kept = h + W;
    strip(task / cuts.parts, [&](int64_t stream, int64_t first, int64_t n) {
      Arena arena(memory);
      std::memset(h, 0, size_t(n) * sizeof(F));
      for (int64_t c = 0; c < n; ++c) kept[c] = 1;
      range(part, [&](int64_t t0, int64_t t1) { make(stream, first, n, arena).pass(t0, t1, h, kept); });
    });
  });
  FlushDenormals flush;
  Buffer<F> row(W);
  for (int64_t i = 0; i < cuts.strips; ++i) {
    strip(i, [&](int64_t stream, int64_t first, int64_t n) {
      F* h = row.data();
      start(stream, first, n, h);
      for (int64_t k = 0; k < cuts.parts; ++k) {
        F *to = place(i, reverse ? cuts.parts - 1 - k : k), *kept = to + W;
        for (int64_t c = 0; c < n; ++c) {
          const F next = kept[c] * h[c] + to[c];
          to[c] = h[c], h[c] = next;
        }
      }
      finish(stream, first, n, h);
    });
  }
  parallel(cuts.strips * cuts.parts, bytes, [&](int64_t task, char* memory) {
    FlushDenormals again;
    const int64_t part = task % cuts.parts;
    F* h = place(task / cuts.parts, part);
    strip(task / cuts.parts, [&](int64_t stream, int64_t first, int64_t n) {
      Arena arena(memory);
      range(part, [&](int64_t t0, int64_t t1) { make(stream, first, n, arena).write(t0, t1, h); });
    });
  });
}

template <class F>
void forward(const GatedScan& p) {
  scan<F>(
      p, false,
      [&](int64_t stream, int64_t first, int64_t n, Arena& arena) { return Forward<F>(p, stream, first, n, arena); },
      [&](int64_t stream, int64_t first, int64_t n, F* h) { Forward<F>::start(p, stream, first, n, h); },
      [](int64_t, int64_t, int64_t, F*) {});
}

template <class F>
void backward(const GatedScanBackward& b) {
  const GatedScan& p = b.forward;
  scan<F>(
      p, true,
      [&](int64_t stream, int64_t first, int64_t n, Arena& arena) { return Backward<F>(b, stream, first, n, arena); },
      [](int64_t, int64_t, int64_t n, F* h) { std::memset(h, 0, size_t(n) * sizeof(F)); },
      [&](int64_t stream, int64_t first, int64_t n, F* h) {
        if (b.d_initial) write_row<F>(h, n, b.d_initial.dtype, Strip<F>(b.d_initial, p.lead, 1, stream, first).base);
      });
}

}  // namespace

void gated_scan(const GatedScan& p) {
  if (p.forget.dtype == DType::f64) forward<double>(p);
  else forward<float>(p);
}

void gated_scan_backward(const GatedScanBackward& b) {
  if (b.forward.forget.dtype == DType::f64) backward<double>(b);
  else backward<float>(b);
}

}  // namespace mk::MK_ISA
