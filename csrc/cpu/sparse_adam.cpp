// sparse_adam:  m += (1 - b1) (g - m),  v += (1 - b2) (g^2 - v),  w -= step m / (sqrt(v) + eps)  on rows with gradients
//
// Rows run in parallel, in tiles; lanes run along the row. Each of the four rows is read once and three are written:
// bound by the bandwidth of scattered rows, which are prefetched.
#include "params/sparse_adam.h"

#include "cpu/tiles/load_as.h"
#include "cpu/tiles/parallel.h"
#include "cpu/tiles/scores.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t kTileBytes = 1 << 16;  // of gradients per task
constexpr int64_t kRowsAhead = 4;

template <class F>
void step_row(const SparseAdam& p, const F* g, F* w, F* m, F* v) {
  const F b1 = F(1 - p.beta1), b2 = F(1 - p.beta2), step = F(p.step_size), eps = F(p.eps);
  for (int64_t c = 0; c < p.V; ++c) {
    m[c] += b1 * (g[c] - m[c]);
    v[c] += b2 * (g[c] * g[c] - v[c]);
    w[c] -= step * m[c] / (std::sqrt(v[c]) + eps);
  }
}

template <class F>
void step_rows(const SparseAdam& p) {
  const int64_t item = size_of(p.dtype), bytes = p.V * item, moments = p.V * int64_t(sizeof(F));
  const int64_t tile = most(1, kTileBytes / most(bytes, 1));
  Arena measure;
  for (int i = 0; i < 2; ++i) measure.take<F>(p.V);
  parallel(div_up(p.count, tile), measure.used(), [&](int64_t task, char* memory) {
    Arena arena(memory);
    F *g_buffer = arena.take<F>(p.V), *w_buffer = arena.take<F>(p.V);
    const int64_t end = least(p.count, (task + 1) * tile);
    for (int64_t j = task * tile; j < end; ++j) {
      const int64_t ahead = p.slots[least(j + kRowsAhead, end - 1)];
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(p.values + ahead * bytes + b, 1, 2);
      for (int64_t b = 0; b < moments; b += 64) {
        __builtin_prefetch(p.first + ahead * moments + b, 1, 2);
        __builtin_prefetch(p.second + ahead * moments + b, 1, 2);
      }
      const int64_t i = p.slots[j];
      char* row = p.values + i * bytes;
      const F* g = row_as<F>(p.gradient + j * bytes, p.dtype, p.V, g_buffer);
      const bool own = p.dtype == kOwn<F>;
      F* w = own ? reinterpret_cast<F*>(row) : w_buffer;
      if (!own) read_row<F>(row, p.dtype, p.V, w);
      step_row<F>(p, g, w, reinterpret_cast<F*>(p.first + i * moments), reinterpret_cast<F*>(p.second + i * moments));
      if (!own) write_row<F>(w, p.V, p.dtype, row);
    }
  });
}

}  // namespace

void sparse_adam(const SparseAdam& p) {
  if (p.dtype == DType::f64) step_rows<double>(p);
  else step_rows<float>(p);
}

}  // namespace mk::MK_ISA
