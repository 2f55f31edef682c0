#include <cstring>

#include "binding/chosen_slots.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace mk {

void check_indices(const char* op, const Choice& c, const char* argument) {
  if (c.k == 0) return;  // of any number of tokens
  const int64_t wrong = MK_CALL(wrong_index, c);
  check(wrong == -1, op, ": ", argument, " must be in [-1, ", c.N, "), got ", wrong);
}

bool zero_pages(char* data, size_t bytes, size_t rows, size_t row_bytes) {
#if defined(__linux__)
  // From this size on the C library maps memory of its own for every allocation, so no page here is warm.
  constexpr size_t kLarge = size_t(32) << 20;
  if (bytes < kLarge) return false;
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), at = reinterpret_cast<size_t>(data);
  char* begin = data + ((page - at % page) % page);
  const size_t length = size_t(data + bytes - begin) / page * page;
  // Marks tell whether the pages have really gone: of memory backed by a file, under a foreign allocator, they would
  // stay.
  volatile char* marks[] = {begin, begin + length / 2, begin + length - 1};
  for (volatile char* mark : marks) *mark = 1;
  if (madvise(begin, length, MADV_DONTNEED) != 0) return false;
  for (volatile char* mark : marks) {
    if (*mark != 0) return false;
  }
  // A page of 4 KiB costs as much when it is first touched as four of the 512 that are made at once in one of 2 MiB. Two
  // threads, dense gradient of sparse_read, 2^20 rows of 1 KiB of which 131072 are chosen: 184 -> 96 ms with freeing it.
  constexpr size_t kAtOnce = 4;
  if (kAtOnce * rows * (row_bytes / page + 1) >= length / page) want_huge_pages(begin, length);
  std::memset(data, 0, size_t(begin - data));
  std::memset(begin + length, 0, size_t(data + bytes - (begin + length)));
  return true;
#else
  (void)data, (void)bytes, (void)rows, (void)row_bytes;
  return false;
#endif
}

}  // namespace mk
