// Blocks of slots as rows of F. Hides dtype and padding, and skips empty slots (mask -inf): their content is never
// read, and a mostly empty memory costs only its filled slots.
#pragma once

#include "cpu/tiles/parallel.h"
#include "cpu/tiles/rows.h"
#include "cpu/tiles/streaming.h"

namespace mk::MK_ISA {

template <class F>
struct SlotBlock {
  int64_t n = 0;  // slots of the block that may be addressed
  const F* keys = nullptr;
  int64_t ks = 0;  // elements from row to row
  const F* values = nullptr;
  int64_t vs = 0;
  int64_t keys_ahead = 0, values_ahead = 0;  // prefetch distance in elements; 0: no prefetch
  const F* mask = nullptr;                   // added to scores; null: none
  const int32_t* which = nullptr;            // which[j]: position of row j in the block; null: j

  int64_t place(int64_t j) const { return which == nullptr ? j : which[j]; }
};

// The mask of the slots of one batch, as a number to add to scores; none: 0.
template <class F>
struct SlotMask {
  const char* base = nullptr;
  DType dtype = DType::f32;

  SlotMask() = default;
  SlotMask(const View& mask, const Lead& lead, int64_t batch) : dtype(mask.dtype) {
    if (mask) base = mask.batch(lead, batch);
  }
  explicit operator bool() const { return base != nullptr; }
  F at(int64_t i) const {
    if (base == nullptr) return 0;
    if (dtype == DType::boolean) return base[i] != 0 ? F(0) : -kInf<F>;
    F m;
    read_row<F>(base + i * size_of(dtype), dtype, 1, &m);
    return m;
  }
};

// The slots of one batch. `pad`: rows can be read in whole registers, with zeros beyond the width.
template <class F>
class Slots {
 public:
  // Rows in their stored dtype.
  struct Source {
    const char* base = nullptr;
    DType dtype = DType::f32;
    int64_t stride = 0;
    RowScale scale;

    const char* row(int64_t slot) const { return base == nullptr ? nullptr : base + slot * stride; }
  };

  Slots(const SlotView& keys, const SlotView& values, const View& mask, const Lead& lead, int64_t batch, int64_t N,
        int64_t K, int64_t V, bool pad)
      : K_(K),
        V_(V),
        keys_(rows(keys, lead, batch)),
        values_(rows(values, lead, batch)),
        mask_(mask, lead, batch),
        pad_(pad) {
    far_ =
        N * (copies(keys, lead) * row_lines(keys_, K) + copies(values, lead) * row_lines(values_, V)) * 64 >= kFarBytes;
  }

  struct Buffers {
    F *keys, *values, *mask;
    int32_t* which;
  };
  static Buffers buffers(Arena& arena, int64_t block, int64_t K, int64_t V) {
    return {arena.take<F>(block * padded(K)), arena.take<F>(block * padded(V)), arena.take<F>(block),
            arena.take<int32_t>(block)};
  }
  static int64_t padded(int64_t width) { return round_up(width, kLanes<F>); }

  // Prefetches the values of slots [first, end), some cache lines at a time. Hardware prefetch follows only a few
  // streams; a block has a hundred rows, read half a dozen at a time.
  class Prefetch {
   public:
    Prefetch(const Slots& s, int64_t first, int64_t end)
        : row_(s.values_.base + first * s.values_.stride),
          bytes_(s.values_.base == nullptr ? 0 : s.V_ * size_of(s.values_.dtype)),
          stride_(s.values_.stride),
          left_(end - first) {}
    MK_INLINE void next(int64_t lines) {
      for (; lines > 0 && left_ > 0; row_ += stride_, at_ = 0, --left_) {
        for (; at_ < bytes_ && lines > 0; at_ += 64, --lines) __builtin_prefetch(row_ + at_, 0, 2);
        if (at_ < bytes_) return;
      }
    }

   private:
    const char* row_;
    int64_t bytes_, stride_, left_, at_ = 0;
  };

  // Cache lines of the values of one slot.
  int64_t value_lines() const { return row_lines(values_, V_); }

  const Source& stored_keys() const { return keys_; }
  const Source& stored_values() const { return values_; }

  // Lists the slots of [first, first + count) that may be addressed, without their rows. count is at most the block
  // size.
  SlotBlock<F> list(int64_t first, int64_t count, const Buffers& b) const {
    SlotBlock<F> block;
    block.n = count;
    if (mask_) {
      int64_t n = 0;
      for (int64_t i = 0; i < count; ++i) {
        const F m = mask_.at(first + i);
        if (m == -kInf<F>) continue;
        b.mask[n] = m;
        b.which[n++] = int32_t(i);
      }
      block.n = n;
      block.mask = mask_.dtype == DType::boolean ? nullptr : b.mask;
      block.which = n == count ? nullptr : b.which;
    }
    return block;
  }
  // The same, with their rows.
  SlotBlock<F> load(int64_t first, int64_t count, const Buffers& b) const {
    SlotBlock<F> block = list(first, count, b);
    fetch(keys_, K_, first, block, b.keys, block.keys, block.ks, block.keys_ahead);
    if (values_.base != nullptr) fetch(values_, V_, first, block, b.values, block.values, block.vs, block.values_ahead);
    return block;
  }

 private:
  // The number of batches that have rows of their own in `v`.
  static int64_t copies(const View& v, const Lead& lead) {
    int64_t n = 1;
    for (int d = 0; d < lead.rank; ++d) n *= lead.shared[d] || v.lead[d] == 0 ? 1 : lead.size[d];
    return n;
  }
  static int64_t row_lines(const Source& s, int64_t width) {
    return s.base == nullptr ? 0 : div_up(width * size_of(s.dtype), 64);
  }
  static Source rows(const SlotView& v, const Lead& lead, int64_t batch) {
    return v ? Source{v.batch(lead, batch), v.dtype, v.row, RowScale(v, lead, batch)} : Source{};
  }
  void fetch(const Source& s, int64_t width, int64_t first, const SlotBlock<F>& block, F* buffer, const F*& out,
             int64_t& stride, int64_t& ahead) const {
    const int64_t item = int64_t(sizeof(F));
    const bool whole = !pad_ || width % kLanes<F> == 0;
    if (s.dtype == kOwn<F> && block.which == nullptr && whole && s.stride % item == 0) {
      out = reinterpret_cast<const F*>(s.base + first * s.stride);
      stride = s.stride / item;
      ahead = far_ ? div_up(kPrefetchBytes, most(width, 1) * item) * stride : 0;
      return;
    }
    stride = padded(width);
    for (int64_t j = 0; j < block.n; ++j) {
      F* row = buffer + j * stride;
      const int64_t slot = first + block.place(j);
      const char* from = s.base + slot * s.stride;
      if (is_compressed(s.dtype)) read_compressed_row<F>(from, s.dtype, width, s.scale.template at<F>(slot), row);
      else read_row<F>(from, s.dtype, width, row);
      for (int64_t c = width; c < stride; ++c) row[c] = 0;
    }
    out = buffer;
  }

  int64_t K_, V_;
  Source keys_, values_;
  SlotMask<F> mask_;
  bool pad_, far_;
};

}  // namespace mk::MK_ISA
