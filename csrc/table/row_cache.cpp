#include "table/row_cache.h"

#include <bit>
#include <cstring>

namespace mk::table {

constexpr uint8_t kMostUses = 3;

RowCache::RowCache(int64_t rows, int64_t row_bytes) : row_bytes_(row_bytes), capacity_(rows) {
  const size_t entries = std::bit_ceil(size_t(rows) * 2 + 1);
  shift_ = 64 - std::countr_zero(entries), mask_ = entries - 1;
  entries_.assign(entries, -1);
  slot_of_.assign(size_t(rows), -1), uses_.assign(size_t(rows), 0);
  rows_.at_least(bytes_of(size_t(rows), size_t(row_bytes)));
}

size_t RowCache::place(int64_t slot) const {
  size_t i = home(slot);
  while (entries_[i] >= 0 && slot_of_[size_t(entries_[i])] != slot) i = (i + 1) & mask_;
  return i;
}

const char* RowCache::find(int64_t slot) {
  if (capacity_ == 0) return nullptr;
  const int64_t frame = entries_[place(slot)];
  if (frame < 0) return nullptr;
  uint8_t& uses = uses_[size_t(frame)];
  if (uses < kMostUses) ++uses;
  return rows_.data() + frame * row_bytes_;
}

void RowCache::insert(int64_t slot, const char* row) {
  if (capacity_ == 0 || entries_[place(slot)] >= 0) return;
  const int64_t frame = used_ < capacity_ ? used_++ : evict();
  slot_of_[size_t(frame)] = slot, uses_[size_t(frame)] = 0;
  entries_[place(slot)] = frame;
  std::memcpy(rows_.data() + frame * row_bytes_, row, size_t(row_bytes_));
}

int64_t RowCache::evict() {
  for (;; hand_ = (hand_ + 1) % capacity_) {
    uint8_t& uses = uses_[size_t(hand_)];
    if (uses > 0) {
      --uses;
      continue;
    }
    const int64_t frame = hand_;
    hand_ = (hand_ + 1) % capacity_;
    erase(slot_of_[size_t(frame)]);
    ++evictions_;
    return frame;
  }
}

// Entries after the hole move into it where their search would pass it.
void RowCache::erase(int64_t slot) {
  size_t hole = place(slot);
  for (size_t i = (hole + 1) & mask_; entries_[i] >= 0; i = (i + 1) & mask_) {
    const size_t from = home(slot_of_[size_t(entries_[i])]);
    if (((i - from) & mask_) >= ((i - hole) & mask_)) entries_[hole] = entries_[i], hole = i;
  }
  entries_[hole] = -1;
}

}  // namespace mk::table
