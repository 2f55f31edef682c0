// Blocks of slots as rows of F. Hides dtype and padding, and leaves out empty slots (mask -inf): what lies in an empty slot is
// never looked at, and a mostly empty memory costs only what is in it.
#pragma once

#include "cpu/tiles/parallel.h"
#include "cpu/tiles/rows.h"
#include "cpu/tiles/streaming.h"

namespace mk::MK_ISA {

template <class F>
struct SlotBlock {
  int64_t n = 0;  // slots in it that may be addressed
  const F* keys = nullptr;
  int64_t ks = 0;  // elements from row to row
  const F* values = nullptr;
  int64_t vs = 0;
  int64_t keys_ahead = 0, values_ahead = 0;  // elements from a row to the one to ask for with it; 0: nothing to ask for
  const F* mask = nullptr;                   // added to scores; null: none
  const int32_t* which = nullptr;            // which[j]: place of row j in the block; null: place j

  int64_t place(int64_t j) const { return which == nullptr ? j : which[j]; }
};

// The slots of one batch. `pad`: rows are readable in whole registers (zeros behind the end).
template <class F>
class Slots {
 public:
  // Rows as they are stored.
  struct Source {
    const char* base = nullptr;
    DType dtype = DType::f32;
    int64_t stride = 0;
    RowScale scale;

    const char* row(int64_t slot) const { return base == nullptr ? nullptr : base + slot * stride; }
  };

  Slots(const SlotView& keys, const SlotView& values, const View& mask, const Lead& lead, int64_t batch, int64_t N,
        int64_t K, int64_t V, bool pad)
      : K_(K), V_(V), keys_(rows(keys, lead, batch)), values_(rows(values, lead, batch)), pad_(pad) {
    if (mask) mask_ = mask.batch(lead, batch), mask_dtype_ = mask.dtype;
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

  // Asks for the values of slots [first, end) before they are needed, some cache lines at a time. Hardware follows a few streams; a
  // block is a hundred rows, read half a dozen at a time.
  class Ahead {
   public:
    Ahead(const Slots& s, int64_t first, int64_t end)
        : row_(s.values_.base + first * s.values_.stride),
          bytes_(s.values_.base == nullptr ? 0 : s.V_ * size_of(s.values_.dtype)),
          stride_(s.values_.stride),
          left_(end - first) {}
    MK_INLINE void ask(int64_t lines) {
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

  // Which of the slots [first, first + count) may be addressed, without their rows; count at most the block size of the buffers.
  SlotBlock<F> list(int64_t first, int64_t count, const Buffers& b) const {
    SlotBlock<F> block;
    block.n = count;
    if (mask_ != nullptr) {
      int64_t n = 0;
      for (int64_t i = 0; i < count; ++i) {
        const F m = mask_at(first + i);
        if (m == -kInf<F>) continue;
        b.mask[n] = m;
        b.which[n++] = int32_t(i);
      }
      block.n = n;
      block.mask = mask_dtype_ == DType::boolean ? nullptr : b.mask;
      block.which = n == count ? nullptr : b.which;
    }
    return block;
  }
  // And with them.
  SlotBlock<F> load(int64_t first, int64_t count, const Buffers& b) const {
    SlotBlock<F> block = list(first, count, b);
    fetch(keys_, K_, first, block, b.keys, block.keys, block.ks, block.keys_ahead);
    if (values_.base != nullptr) fetch(values_, V_, first, block, b.values, block.values, block.vs, block.values_ahead);
    return block;
  }

 private:
  // How many batches have rows of their own in `v`.
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
  F mask_at(int64_t i) const {
    switch (mask_dtype_) {
      case DType::boolean: return mask_[i] != 0 ? F(0) : -kInf<F>;
      default: {
        F m;
        read_row<F>(mask_ + i * size_of(mask_dtype_), mask_dtype_, 1, &m);
        return m;
      }
    }
  }
  void fetch(const Source& s, int64_t width, int64_t first, const SlotBlock<F>& block, F* buffer, const F*& out,
             int64_t& stride, int64_t& ahead) const {
    const int64_t item = int64_t(sizeof(F));
    const bool whole = !pad_ || width % kLanes<F> == 0;
    if (s.dtype == kOwn<F> && block.which == nullptr && whole && s.stride % item == 0) {
      out = reinterpret_cast<const F*>(s.base + first * s.stride);
      stride = s.stride / item;
      ahead = far_ ? div_up(kBytesAhead, most(width, 1) * item) * stride : 0;
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
  const char* mask_ = nullptr;
  DType mask_dtype_ = DType::f32;
  bool pad_, far_;
};

}  // namespace mk::MK_ISA
