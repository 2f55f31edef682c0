// gather_rows:  out_j = scale_{i, c} v_i,  i = indices[j],  c the block of the column;  zeros where i is -1
// backward:     dv_i = sum over i[j] = i of d_j
//
// Entries run in parallel, in tiles; lanes run along the row. Each chosen row is read once from wherever the table lies
// and written once: bound by the bandwidth of scattered rows, many of which must be in flight at once (gather_tile).
// Results larger than the caches take non-temporal stores. 8-bit numbers are exact in float, their product with the
// scale is rounded once, and once more to the dtype of the result: the numbers of plain PyTorch, to the bit. dv is a
// segmented sum over the entries sorted by slot (cpu/tiles/segments.h).
#include "params/gather_rows.h"

#include <algorithm>

#include "cpu/tiles/load_as.h"
#include "cpu/tiles/segments.h"
#include "cpu/tiles/streaming.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t kTileBytes = 1 << 17;  // of the result per task
constexpr int64_t kStageBytes = 1 << 14;
constexpr int W = kLanes<float>;
constexpr int64_t kUnit = 2 * W;  // columns that become a whole register of 16-bit numbers

// What multiplies block c of a row: a float, or a power of two whose exponent is stored.
MK_INLINE float scale_at(const char* row, DType dtype, int64_t c) {
  if (dtype == DType::f32) return reinterpret_cast<const float*>(row)[c];
  const auto e = uint8_t(row[c]);
  return from_bits(e == 255 ? 0x7fc00000u : e == 0 ? 0x00400000u : uint32_t(e) << 23);
}

// Columns [0, n) of a row of dtype D, times `scale` if D has 8 bits, to dtype O. put(p, v) stores whole registers.
template <DType D, DType O, class Put>
MK_INLINE void convert(const char* src, char* dst, int64_t n, float scale, Put put) {
  constexpr bool kScaled = D == DType::i8 || D == DType::e4m3;
  constexpr int from = kSize<D>, to = kSize<O>;
  const Vec<float> s = fill<float>(scale);
  auto times = [&](Vec<float> x) { return kScaled ? s * x : x; };
  int64_t c = 0;
  for (; c + kUnit <= n; c += kUnit) {
    const Vec<float> a = times(load_as<float, D>(src + c * from)), b = times(load_as<float, D>(src + (c + W) * from));
    auto* out = reinterpret_cast<float*>(dst + c * to);
    if constexpr (O == DType::f32) put(out, a), put(out + W, b);
    else put(out, narrowed<O>(a, b));
  }
  for (; c < n; c += W) {
    const int64_t live = least(W, n - c);
    float lanes[W];
    store<float>(lanes, times(load_first_as<float, D>(src + c * from, live)));
    write_row<float>(lanes, live, O, dst + c * to);
  }
}

// A row of another dtype than the result, or of 8 bits with its scales.
template <DType D, DType O, class Put>
MK_INLINE void convert_row(const GatherRows& p, const char* src, const char* scale, char* dst, Put put) {
  if constexpr (D != DType::i8 && D != DType::e4m3) return convert<D, O>(src, dst, p.V, 1.0f, put);
  // Blocks of less than a register, or that end within one, are not written with whole registers.
  const int64_t step = least(p.block, p.V);
  for (int64_t c = 0, b = 0; c < p.V; c += step, ++b) {
    const int64_t n = least(step, p.V - c);
    char* out = dst + c * kSize<O>;
    if (c % kUnit == 0) convert<D, O>(src + c, out, n, scale_at(scale, p.scale_dtype, b), put);
    else convert<D, O>(src + c, out, n, scale_at(scale, p.scale_dtype, b), Store{});
  }
}

// A row as it is.
template <class Put>
MK_INLINE void copy_row(const char* src, char* dst, int64_t bytes, Put put) {
  int64_t i = 0;
  for (; i + MK_BYTES <= bytes; i += MK_BYTES) {
    put(reinterpret_cast<float*>(dst + i), load<float>(reinterpret_cast<const float*>(src + i)));
  }
  std::memcpy(dst + i, src + i, size_t(bytes - i));
}

template <DType D>
void convert_to_double(const GatherRows& p, const char* src, const char* scale, double* dst) {
  for (int64_t c = 0, b = 0; c < p.V; c += p.block, ++b) {
    const int64_t n = least(p.block, p.V - c);
    read_compressed<double, D>(src + c, n, double(scale_at(scale, p.scale_dtype, b)), dst + c);
  }
}

// Room for rows with their scales.
struct Stage {
  int64_t scale, stride, rows;
  bool staged;
  Stage(int64_t bytes, int64_t factors)
      : scale(round_up(bytes, 64)),
        stride(scale + round_up(factors, 64)),
        rows(most(1, kStageBytes / most(stride, 1))) {
    staged = stride <= kStageBytes / 4;  // longer rows bring their own parallelism
  }
};

// The scales of entries [j, j + n), `factors` bytes each, `stride` bytes apart.
MK_INLINE void copy_scales(const GatherRows& p, int64_t j, int64_t n, int64_t factors, char* out, int64_t stride) {
  const auto copy = [&](auto bytes) {
    for (int64_t r = 0; r < n; ++r) {
      const int64_t i = p.indices[j + r];
      if (i >= 0) std::memcpy(out + r * stride, p.scale + i * p.scale_row, size_t(bytes));
    }
  };
  if (factors == 4) copy(std::integral_constant<int64_t, 4>());
  else if (factors == 8) copy(std::integral_constant<int64_t, 8>());
  else copy(factors);
}

// Entries [j, end) of the gather, which row(src, scale, dst) converts one by one.
//
// Rows are first copied to `stage`, in the L1 cache, scales before them: a few instructions a row, so that a dozen rows
// are in flight at once. While a row is converted the processor looks ahead no further than that row. Prefetch does not
// help: it retires only when its page has been found, and holds up what is behind it. One thread, 196,608 rows of 256
// bytes of 4 GiB: 15 ms in order, 63 with prefetch 16 rows ahead, 33 with a stage, 62 with both.
template <class Row>
MK_INLINE void gather_tile(const GatherRows& p, int64_t j, int64_t end, char* stage, Row&& row) {
  const int64_t bytes = p.V * size_of(p.dtype), out_bytes = p.V * size_of(p.out_dtype);
  const int64_t factors = p.scale == nullptr ? 0 : div_up(p.V, p.block) * size_of(p.scale_dtype);
  const Stage s(bytes, factors);
  for (; j < end; j += s.rows) {
    const int64_t n = least(s.rows, end - j);
    if (s.staged && factors != 0) copy_scales(p, j, n, factors, stage + s.scale, s.stride);
    for (int64_t r = 0; r < n && s.staged; ++r) {
      const int64_t i = p.indices[j + r];
      if (i < 0) continue;
      copy_row(p.values + i * p.row, stage + r * s.stride, bytes, Store{});
    }
    for (int64_t r = 0; r < n; ++r) {
      const int64_t i = p.indices[j + r];
      char* dst = p.out + (j + r) * out_bytes;
      const char* held = stage + r * s.stride;
      if (i < 0) std::memset(dst, 0, size_t(out_bytes));
      else if (s.staged) row(held, held + s.scale, dst);
      else row(p.values + i * p.row, p.scale + i * p.scale_row, dst);
    }
  }
}

template <DType D, DType O>
void gather_as(const GatherRows& p, int64_t j, int64_t end, char* stage, bool non_temporal) {
  with_stores(non_temporal, [&](auto put) {
    gather_tile(p, j, end, stage,
                [&](const char* src, const char* scale, char* dst) { convert_row<D, O>(p, src, scale, dst, put); });
  });
}

template <DType O>
void gather_to(const GatherRows& p, int64_t j, int64_t end, char* stage, bool non_temporal) {
  switch (p.dtype) {
    case DType::f32: return gather_as<DType::f32, O>(p, j, end, stage, non_temporal);
    case DType::bf16: return gather_as<DType::bf16, O>(p, j, end, stage, non_temporal);
    case DType::f16: return gather_as<DType::f16, O>(p, j, end, stage, non_temporal);
    case DType::i8: return gather_as<DType::i8, O>(p, j, end, stage, non_temporal);
    default: return gather_as<DType::e4m3, O>(p, j, end, stage, non_temporal);
  }
}

// Rows as they are: nothing but loads and stores, so they need no stage.
void copy_some(const GatherRows& p, int64_t j, int64_t end, bool non_temporal) {
  const int64_t bytes = p.V * size_of(p.dtype);
  with_stores(non_temporal, [&](auto put) {
    for (; j < end; ++j) {
      if (p.indices[j] < 0) std::memset(p.out + j * bytes, 0, size_t(bytes));
      else copy_row(p.values + p.indices[j] * p.row, p.out + j * bytes, bytes, put);
    }
  });
}

void gather_some(const GatherRows& p, int64_t j, int64_t end, char* stage, bool non_temporal) {
  if (p.dtype == p.out_dtype) return copy_some(p, j, end, non_temporal);
  switch (p.out_dtype) {
    case DType::f32: return gather_to<DType::f32>(p, j, end, stage, non_temporal);
    case DType::bf16: return gather_to<DType::bf16>(p, j, end, stage, non_temporal);
    case DType::f16: return gather_to<DType::f16>(p, j, end, stage, non_temporal);
    default:
      return gather_tile(p, j, end, stage, [&](const char* src, const char* scale, char* dst) {
        if (p.dtype == DType::i8) convert_to_double<DType::i8>(p, src, scale, reinterpret_cast<double*>(dst));
        else convert_to_double<DType::e4m3>(p, src, scale, reinterpret_cast<double*>(dst));
      });
  }
}

}  // namespace

int64_t gather_rows(const GatherRows& p) {
  for (int64_t j = 0; j < p.count; ++j) {
    if (p.indices[j] < -1 || p.indices[j] >= p.N) return p.indices[j];
  }
  const int64_t bytes = p.V * size_of(p.out_dtype), tile = most(1, kTileBytes / most(bytes, 1));
  if (bytes == 0) return -1;
  const bool non_temporal = is_non_temporal(p.out, bytes, p.count * bytes);
  parallel(div_up(p.count, tile), kStageBytes, [&](int64_t task, char* stage) {
    gather_some(p, task * tile, least(p.count, (task + 1) * tile), stage, non_temporal);
  });
  return -1;
}

template <class F>
static void sum_rows(const GatherRowsBackward& b) {
  Buffer<F> ones(b.choice.all_tokens());
  std::fill_n(ones.data(), b.choice.all_tokens(), F(1));
  TokenPointers rows(b.d_rows, b.choice.lead, b.choice.T);
  const Sum<F> sum{b.d_values, b.V, ones.data(), F(1), rows.data(), b.d_rows.dtype};
  sum_chosen(b.choice, &sum, 1);
}

void gather_rows_backward(const GatherRowsBackward& b) {
  if (b.d_rows.dtype == DType::f64) sum_rows<double>(b);
  else sum_rows<float>(b);
}

}  // namespace mk::MK_ISA
