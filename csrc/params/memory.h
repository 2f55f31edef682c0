// Memory that a call cannot have, and sizes in bytes that no integer holds.
#pragma once

#include <cstddef>
#include <new>

namespace mk {

// Memory that a call needs and cannot have. The binding makes a sentence of it that names the op.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(size_t bytes) : bytes_(bytes) {}
  size_t bytes() const { return bytes_; }  // 0: nobody knows how many

 private:
  size_t bytes_;
};

// A size in bytes that is no address space's; far enough below the largest integer that adding to it stays there.
constexpr size_t kTooManyBytes = size_t(1) << 62;

inline size_t bytes_of(size_t count, size_t item) {
  size_t bytes = 0;
  return __builtin_mul_overflow(count, item, &bytes) || bytes > kTooManyBytes ? kTooManyBytes : bytes;
}

}  // namespace mk
