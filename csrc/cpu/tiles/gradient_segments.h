// Sums over segments of the tokens. Few slots are too few chunks for the threads, so the tiles of a panel are cut into
// segments (GradientShape). Each keeps dk, dv and dm of all slots, and they are added up in the order of the segments.
// Two threads, K=V=64 T=1024 N=64, one step of softmax_read against plain PyTorch: 0.59x with one task, 0.94x with
// eight segments.
#pragma once

#include <algorithm>

#include "cpu/tiles/gradient_shape.h"

namespace mk::MK_ISA {

template <class F>
class SegmentSums {
 public:
  SegmentSums() = default;
  SegmentSums(const GradientShape<F>& s, const GradientViews& out, Arena& arena)
      : s_(&s), keys_(out.keys), values_(out.values), mask_(out.mask) {
    sums_ = arena.take<F>(several() ? s.segments * s.sums() : 0);
    counts_ = arena.take<int64_t>(several() ? s.segments * blocks() : 0);
  }
  static size_t bytes(const GradientShape<F>& s) {
    Arena measure;
    SegmentSums<F>(s, {}, measure);
    return measure.used();
  }

  bool several() const { return s_->segments > 1; }
  int64_t blocks() const { return div_up(s_->N, kSlotBlock); }

  // Keeps the sums of a block of slots over a segment. No rows: none of its tokens may address one.
  void keep(int64_t segment, int64_t first, const SlotBlock<F>& block, const ChunkMemory<F>& w) const {
    const Kept to = kept(segment, first);
    to.n = block.n;
    if (keys_) std::copy_n(w.dk, block.n * s_->KP, to.dk);
    if (values_) std::copy_n(w.dv, block.n * s_->VP, to.dv);
    if (mask_) std::copy_n(w.dm, block.n, to.dm);
  }
  // Adds up the segments of a block in `w`. Returns the number of its rows.
  int64_t add_up(int64_t first, const ChunkMemory<F>& w) const {
    int64_t n = 0;
    for (int64_t segment = 0; segment < s_->segments; ++segment) {
      const Kept part = kept(segment, first);
      if (part.n == 0) continue;
      if (keys_) add(part.dk, part.n * s_->KP, n > 0, w.dk);
      if (values_) add(part.dv, part.n * s_->VP, n > 0, w.dv);
      if (mask_) add(part.dm, part.n, n > 0, w.dm);
      n = part.n;
    }
    return n;
  }

 private:
  struct Kept {
    F *dk, *dv, *dm;
    int64_t& n;  // rows
  };
  Kept kept(int64_t segment, int64_t first) const {
    const int64_t count = least(kSlotBlock, s_->N - first);
    F* at = sums_ + segment * s_->sums() + first * (s_->KP + s_->VP + 1);
    return {at, at + count * s_->KP, at + count * (s_->KP + s_->VP), counts_[segment * blocks() + first / kSlotBlock]};
  }
  static void add(const F* from, int64_t n, bool more, F* to) {
    if (!more) std::copy_n(from, n, to);
    for (int64_t i = 0; more && i < n; ++i) to[i] += from[i];
  }

  const GradientShape<F>* s_ = nullptr;
  bool keys_ = false, values_ = false, mask_ = false;
  F* sums_ = nullptr;
  int64_t* counts_ = nullptr;
};

}  // namespace mk::MK_ISA
