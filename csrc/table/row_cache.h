// Rows of a table on disk that stay in memory: a hash table of frames, replaced by CLOCK with two bits.
//
// A hit raises a frame's count to at most kMostUses, the hand lowers counts as it passes, and the first frame at 0
// gives way. A row comes in at 0, so one that is read once is the first to go. Not synchronised: its owner has a lock.
#pragma once

#include <cstdint>
#include <vector>

#include "table/bytes.h"

namespace mk::table {

class RowCache {
 public:
  RowCache(int64_t rows, int64_t row_bytes);
  // The row, or null. A hit counts as a use.
  const char* find(int64_t slot);
  void insert(int64_t slot, const char* row);
  int64_t resident() const { return used_; }
  int64_t evictions() const { return evictions_; }

 private:
  size_t home(int64_t slot) const { return size_t(uint64_t(slot) * 0x9e3779b97f4a7c15u >> shift_); }
  size_t place(int64_t slot) const;  // of its entry, or of the empty one that ends the search
  void erase(int64_t slot);
  int64_t evict();

  int64_t row_bytes_, capacity_, used_ = 0, hand_ = 0, evictions_ = 0;
  int shift_;
  size_t mask_;
  std::vector<int64_t> entries_;  // a frame each, -1: empty; at most half are taken
  std::vector<int64_t> slot_of_;  // [capacity]
  std::vector<uint8_t> uses_;     // [capacity]
  Bytes rows_;                    // [capacity, row_bytes]
};

}  // namespace mk::table
