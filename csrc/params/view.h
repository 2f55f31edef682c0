// Tensors as kernels see them: raw pointers, byte strides, and leading dimensions that broadcast.
//
// All tensors of one call share a list of leading dimensions (Lead), and have stride 0 where they are broadcast. A
// dimension that no memory tensor has is `shared`: its tokens are folded into T, row-major. The others enumerate the
// batches, each with a memory of its own.
#pragma once

#include <cstdint>

// Parameters are copied to the GPU as they are, so their accessors compile for both sides.
#ifdef __CUDACC__
#define MK_BOTH __host__ __device__
#else
#define MK_BOTH
#endif

// For loops of divisions: unrolling them everywhere doubles the code that nvcc compiles.
#ifdef __CUDA_ARCH__
#define MK_ROLLED _Pragma("unroll 1")
#else
#define MK_ROLLED
#endif

namespace mk {

enum class DType : int8_t { f32, bf16, f16, f64, boolean, i64, i8, e4m3, e8m0 };

inline bool is_compressed(DType d) { return d == DType::i8 || d == DType::e4m3; }

MK_BOTH inline int64_t size_of(DType d) {
  switch (d) {
    case DType::f32: return 4;
    case DType::bf16:
    case DType::f16: return 2;
    case DType::boolean:
    case DType::i8:
    case DType::e4m3:
    case DType::e8m0: return 1;
    default: return 8;
  }
}

MK_BOTH inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
MK_BOTH inline int64_t div_up(int64_t n, int64_t m) { return (n + m - 1) / m; }
MK_BOTH inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
MK_BOTH inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int kMaxLead = 12;

struct Lead {
  int rank = 0;
  int64_t size[kMaxLead];
  bool shared[kMaxLead];

  MK_BOTH int64_t batches() const { return product(false); }
  MK_BOTH int64_t folded() const { return product(true); }  // a batch has folded() * T token rows

 private:
  MK_BOTH int64_t product(bool which) const {
    int64_t n = 1;
    MK_ROLLED
    for (int d = 0; d < rank; ++d) n *= shared[d] == which ? size[d] : 1;
    return n;
  }
};

// A tensor [lead..., rows, cols] (or [lead..., rows]); the last dimension is contiguous.
struct View {
  char* data = nullptr;  // null if the argument was not given
  DType dtype = DType::f32;
  int64_t row = 0;              // bytes from row to row
  int64_t lead[kMaxLead] = {};  // bytes per leading dimension, 0 where broadcast

  MK_BOTH explicit operator bool() const { return data != nullptr; }

  // The first byte of batch `b`.
  MK_BOTH char* batch(const Lead& l, int64_t b) const {
    char* p = data;
    MK_ROLLED
    for (int d = l.rank - 1; d >= 0; --d) {
      if (l.shared[d]) continue;
      p += b % l.size[d] * lead[d];
      b /= l.size[d];
    }
    return p;
  }
};

// Rows of slots. 8-bit numbers have a `scale`: one float32 (float64 beside float64) per slot, which multiplies its row.
struct SlotView : View {
  View scale;

  SlotView() = default;
  SlotView(const View& rows) : View(rows) {}
  SlotView(const View& rows, const View& row_scale) : View(rows), scale(row_scale) {}
};

// The scales of the rows of one batch.
struct RowScale {
  const char* base = nullptr;
  int64_t stride = 0;

  RowScale() = default;
  RowScale(const SlotView& v, const Lead& lead, int64_t b)
      : base(v.scale ? v.scale.batch(lead, b) : nullptr), stride(v.scale.row) {}
  template <class F>
  F at(int64_t slot) const {
    return base == nullptr ? F(1) : *reinterpret_cast<const F*>(base + slot * stride);
  }
};

// The token rows of one batch, folded: row(t) for t in [0, folded * T).
struct TokenRows {
  char* base = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0, T = 1;
  int folds = 0;
  int64_t fold_size[kMaxLead], fold_stride[kMaxLead];

  TokenRows() = default;
  TokenRows(const View& v, const Lead& l, int64_t b, int64_t tokens) : dtype(v.dtype), stride(v.row), T(tokens) {
    if (!v) return;
    base = v.batch(l, b);
    for (int d = l.rank - 1; d >= 0; --d) {
      if (!l.shared[d] || l.size[d] == 1) continue;
      if (folds == 0 && v.lead[d] == T * stride) {  // one run of rows, found without a division
        T *= l.size[d];
        continue;
      }
      fold_size[folds] = l.size[d];
      fold_stride[folds++] = v.lead[d];
    }
  }
  explicit operator bool() const { return base != nullptr; }

  // out[j] = row(t + j) for n rows, with divisions for runs of rows only: they are most of the time of a row of a few
  // numbers (merge_reads backward, B=4 H=8 T=128 V=64 S=2, two threads: 256 -> 160 us).
  void list(int64_t t, int64_t n, char** out) const {
    for (int64_t j = 0; j < n;) {
      char* p = row(t + j);
      const int64_t end = folds == 0 ? n : least(n, j + T - (t + j) % T);
      for (; j < end; ++j, p += stride) out[j] = p;
    }
  }
  char* row(int64_t t) const {
    if (folds == 0) return base + t * stride;
    char* p = base + t % T * stride;
    t /= T;
    for (int f = 0; f < folds; ++f) {
      p += t % fold_size[f] * fold_stride[f];
      t /= fold_size[f];
    }
    return p;
  }
};

}  // namespace mk
