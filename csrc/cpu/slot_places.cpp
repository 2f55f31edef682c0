// slot_places: one pass over slots that a caller names, in the place of six of numpy: range, live bit, frame. A second
// one counts the hits, each frame once: the top bit marks those that are counted until a third clears it.
#include "params/slot_places.h"

#include <algorithm>

#include "cpu/tiles/parallel.h"

namespace mk::MK_ISA {

int64_t slot_places(const SlotPlaces& p) {
  constexpr uint8_t kMark = 0x80;
  for (int64_t i = 0; i < p.n; ++i) {
    const int64_t slot = p.slots[i];
    if (slot == -1 && p.none) {
      p.places[i] = -1;
      continue;
    }
    if (slot < 0 || slot >= p.capacity || slot / 8 >= p.live_bytes || slot / p.page_slots >= p.pages) return i;
    if ((p.live[slot / 8] >> (slot % 8) & 1) == 0) return i;
    const int64_t page = slot / p.page_slots, frame = p.frame_of[page];
    if (frame < 0 || frame >= p.frames) return i;
    p.places[i] = frame * p.page_slots + (slot - page * p.page_slots);
  }
  for (int64_t i = 0; i < p.n; ++i) {
    if (p.places[i] < 0) continue;
    uint8_t& count = p.count[p.places[i] / p.page_slots];
    if (count < kMark) count = uint8_t(std::min<int>(count, kMostUses - 1) + 1) | kMark;
  }
  for (int64_t i = 0; i < p.n; ++i) {
    if (p.places[i] >= 0) p.count[p.places[i] / p.page_slots] &= uint8_t(kMark - 1);
  }
  return p.n;
}

}  // namespace mk::MK_ISA
