#include <cstring>

#include "binding/chosen_slots.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace mk {

void check_indices(const char* op, const Choice& c, const char* argument) {
  if (c.k == 0) return;  // no index to check, however many tokens
  check_index(op, c, MK_CALL(wrong_index, c), argument);
}

bool zero_pages(char* data, size_t bytes, size_t rows, size_t row_bytes) {
#if defined(__linux__)
  // From this size on malloc maps fresh memory for every allocation, so none of these pages is in a cache.
  constexpr size_t kLarge = size_t(32) << 20;
  if (bytes < kLarge) return false;
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), at = reinterpret_cast<size_t>(data);
  char* begin = data + ((page - at % page) % page);
  const size_t length = size_t(data + bytes - begin) / page * page;
  // Sentinel bytes check that MADV_DONTNEED zeroed the pages. It does not if a foreign allocator took them from a file.
  volatile char* marks[] = {begin, begin + length / 2, begin + length - 1};
  for (volatile char* mark : marks) *mark = 1;
  if (madvise(begin, length, MADV_DONTNEED) != 0) return false;
  for (volatile char* mark : marks) {
    if (*mark != 0) return false;
  }
  // First touch of a page of 4 KiB costs as much as four of the 512 that a huge page of 2 MiB creates at once. Two
  // threads, dense gradient of sparse_read, 2^20 rows of 1 KiB of which 131072 are chosen: 184 -> 96 ms, including the
  // time to free it.
  constexpr size_t kAtOnce = 4;
  if (kAtOnce * rows * (row_bytes / page + 1) >= length / page) advise_huge_pages(begin, length);
  std::memset(data, 0, size_t(begin - data));
  std::memset(begin + length, 0, size_t(data + bytes - (begin + length)));
  return true;
#else
  (void)data, (void)bytes, (void)rows, (void)row_bytes;
  return false;
#endif
}

}  // namespace mk
