#pragma once

#include "params/isa.h"

namespace mk {

// Where slots lie in the frames of a store's memory, and the use of those frames.
struct SlotPlaces {
  const int64_t* slots;  // [n]
  int64_t n;
  bool none;            // slot -1 is one too, in no place
  const uint8_t* live;  // a bit per slot
  int64_t live_bytes, capacity;
  const int32_t* frame_of;  // [pages], -1: not in memory
  int64_t pages, page_slots;
  uint8_t* count;  // [frames]: 0 to kMostUses, the hits of CLOCK
  int64_t frames;
  int64_t* places;  // [n]: frame * page_slots + offset, -1 for slot -1
};
constexpr uint8_t kMostUses = 3;

}  // namespace mk

// Fills `places` and counts one hit more of each frame. Returns n, or the first slot that is not live, in range and in
// memory; then no count has changed.
MK_DECLARE(int64_t, slot_places, SlotPlaces)
