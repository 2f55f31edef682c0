// Memory that begins a page and keeps its size for the next use.
#pragma once

#include <cstddef>
#include <new>

#include "params/memory.h"

namespace mk::table {

constexpr size_t kPage = 4096;  // what O_DIRECT needs of offsets, lengths and memory

class Bytes {
 public:
  Bytes() = default;
  ~Bytes() { drop(); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  char* data() const { return data_; }
  size_t size() const { return size_; }
  // Throws OutOfMemory. What it held is lost where it grows.
  void at_least(size_t bytes) {
    if (bytes <= size_) return;
    drop();
    data_ = bytes >= kTooManyBytes ? nullptr
                                   : static_cast<char*>(::operator new(bytes, std::align_val_t(kPage), std::nothrow));
    if (data_ == nullptr) throw OutOfMemory(bytes);
    size_ = bytes;
  }
  void drop() {
    ::operator delete(data_, std::align_val_t(kPage));
    data_ = nullptr, size_ = 0;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace mk::table
