#include "params/slot_places.h"

#include "binding/binding.h"

namespace mk {
namespace {

constexpr const char* kOp = "slot_places";

// A contiguous tensor of one dimension.
template <class T>
T* numbers(const char* name, const Tensor& t, ScalarType type) {
  check(t.dim() == 1 && t.scalar_type() == type && (t.size(0) <= 1 || t.stride(0) == 1), kOp, ": ", name,
        " must be contiguous, of one dimension, and of its dtype");
  check_storage(kOp, name, t);
  return static_cast<T*>(t.mutable_data_ptr());
}

// The places of slots, or an empty tensor where not all of them are live and in memory.
Tensor run(const Tensor& slots, const Tensor& live, int64_t capacity, const Tensor& frame_of, int64_t page_slots,
           const Tensor& count, bool none) {
  SlotPlaces p;
  p.slots = numbers<int64_t>("slots", slots, ScalarType::Long), p.n = slots.size(0), p.none = none;
  p.live = numbers<uint8_t>("live", live, ScalarType::Byte), p.live_bytes = live.size(0), p.capacity = capacity;
  p.frame_of = numbers<int32_t>("frame_of", frame_of, ScalarType::Int), p.pages = frame_of.size(0);
  p.count = numbers<uint8_t>("count", count, ScalarType::Byte), p.frames = count.size(0);
  check(page_slots >= 1 && page_slots <= kMaxSize, kOp, ": page_slots must be in [1, 2^40], got ", page_slots);
  p.page_slots = page_slots;
  Tensor places = empty({p.n}, ScalarType::Long);
  p.places = static_cast<int64_t*>(places.mutable_data_ptr());
  return MK_CALL(slot_places, p) == p.n ? places : empty({0}, ScalarType::Long);
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) { MK_OPERATOR(m, "slot_places", &mk::run); }
