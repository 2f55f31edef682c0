// Failed allocations, and sizes in bytes that overflow.
#pragma once

#include <cstddef>
#include <new>

namespace mk {

// An allocation that a call needs failed. The binding turns it into an error that names the op.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(size_t bytes) : bytes_(bytes) {}
  size_t bytes() const { return bytes_; }  // 0: unknown

 private:
  size_t bytes_;
};

// Stands for a size beyond any address space; small enough that adding to it does not overflow.
constexpr size_t kTooManyBytes = size_t(1) << 62;

inline size_t bytes_of(size_t count, size_t item) {
  size_t bytes = 0;
  return __builtin_mul_overflow(count, item, &bytes) || bytes > kTooManyBytes ? kTooManyBytes : bytes;
}

}  // namespace mk
