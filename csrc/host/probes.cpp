// Random rows of memory: independent addresses, several rows in flight for each thread, 64 bytes per store. Rows are
// found by number, as in a gather, so that the loop is bound by what the memory gives and not by a chain of loads.
//
// Random blocks of a disk: as many reads under way as there are threads.
#include "host/probes.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "host/processor.h"

namespace memkernels::host {
namespace {

using Clock = std::chrono::steady_clock;
using Copy = void (*)(const char* table, int64_t row_bytes, const int64_t* rows, int64_t first, int64_t stop, char* out,
                      int64_t ahead);

// Rows [first, stop) of the call; TWICE(to, from) writes a piece twice.
#define MK_RANDOM_ROWS(NAME, TWICE, FENCE)                                                                     \
  void NAME(const char* table, int64_t row_bytes, const int64_t* rows, int64_t first, int64_t stop, char* out, \
            int64_t ahead) {                                                                                   \
    for (int64_t j = first - ahead; j < stop; ++j) {                                                           \
      if (j + ahead < stop) {                                                                                  \
        const char* next = table + rows[j + ahead] * row_bytes;                                                \
        for (int64_t b = 0; b < row_bytes; b += kPiece) __builtin_prefetch(next + b, 0, 2);                    \
      }                                                                                                        \
      if (j < first) continue;                                                                                 \
      const char* from = table + rows[j] * row_bytes;                                                          \
      char* to = out + 2 * j * row_bytes;                                                                      \
      for (int64_t b = 0; b < row_bytes; b += kPiece) TWICE(to + 2 * b, from + b);                             \
    }                                                                                                          \
    FENCE;                                                                                                     \
  }

#if defined(__x86_64__)
inline void twice_baseline(char* to, const char* from) {
  __m128i part[4];
  for (int i = 0; i < 4; ++i) part[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i);
  for (int i = 0; i < 8; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, part[i % 4]);
}
MK_RANDOM_ROWS(copy_baseline, twice_baseline, _mm_sfence())
#else
inline void twice_baseline(char* to, const char* from) {
  std::memcpy(to, from, kPiece);
  std::memcpy(to + kPiece, from, kPiece);
}
MK_RANDOM_ROWS(copy_baseline, twice_baseline, (void)0)
#endif

#if defined(MK_HAVE_avx512)
__attribute__((target("avx512f"))) inline void twice_avx512(char* to, const char* from) {
  const __m512i piece = _mm512_loadu_si512(from);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), piece);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to + kPiece), piece);
}
__attribute__((target("avx512f"))) MK_RANDOM_ROWS(copy_avx512, twice_avx512, _mm_sfence())
#endif

    Copy choose_copy() {
#if defined(MK_HAVE_avx512)
  if (features()["avx512f"]) return copy_avx512;
#endif
  return copy_baseline;
}

// Runs work(thread) on so many threads; seconds from the first start to the last end.
double side_by_side(int threads, const std::function<void(int)>& work) {
  std::vector<Clock::time_point> begin(threads), end(threads);
  std::vector<std::thread> pool;
  pool.reserve(threads);
  try {
    for (int t = 0; t < threads; ++t) {
      pool.emplace_back([&, t] {
        begin[t] = Clock::now();
        work(t);
        end[t] = Clock::now();
      });
    }
  } catch (const std::system_error&) {
    for (auto& thread : pool) thread.join();
    throw;
  }
  for (auto& thread : pool) thread.join();
  const auto first = *std::min_element(begin.begin(), begin.end());
  return std::chrono::duration<double>(*std::max_element(end.begin(), end.end()) - first).count();
}

void require(bool fits, const char* name, const char* wanted) {
  if (!fits) throw std::invalid_argument(std::string(name) + ": " + wanted);
}

// The first words of the ranges that one thread reads.
class Reader {
 public:
  Reader(int fd, int64_t largest)
      : fd_(fd),
        memory_(static_cast<char*>(std::aligned_alloc(kBlock, size_t(std::max(largest, kBlock)))), &std::free) {
    if (!memory_) throw std::bad_alloc();
  }
  uint64_t read(int64_t offset, int64_t size) {
    for (int64_t got = 0; got < size;) {
      const ssize_t n = ::pread(fd_, memory_.get() + got, size_t(size - got), offset + got);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) throw std::system_error(errno, std::generic_category(), "direct_reads: the system refused a read");
      if (n == 0) throw std::runtime_error("direct_reads: the file ends within a range");
      got += n;
    }
    uint64_t word = 0;
    if (size > 0) std::memcpy(&word, memory_.get(), sizeof(word));
    return word;
  }

 private:
  int fd_;
  std::unique_ptr<char, decltype(&std::free)> memory_;
};

struct File {
  explicit File(const std::string& path) : fd(::open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC)) {
    if (fd < 0)
      throw std::system_error(errno, std::generic_category(), "direct_reads: the system refused to open " + path);
  }
  ~File() { ::close(fd); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  const int fd;
};

}  // namespace

void random_rows(const char* table, int64_t table_bytes, int64_t row_bytes, const int64_t* rows, int64_t count,
                 char* out, int64_t out_bytes, int threads, int64_t ahead) {
  require(threads >= 1, "random_rows", "threads must be at least 1");
  require(ahead >= 0, "random_rows", "ahead must not be negative");
  require(row_bytes > 0 && row_bytes % kPiece == 0, "random_rows", "row_bytes must be a multiple of 64");
  require(out_bytes == 2 * count * row_bytes, "random_rows", "out must have 2 * row_bytes for each row");
  require(reinterpret_cast<uintptr_t>(out) % kPiece == 0, "random_rows", "out must be aligned to 64 bytes");
  const int64_t held = table_bytes / row_bytes;
  require(std::all_of(rows, rows + count, [&](int64_t i) { return i >= 0 && i < held; }), "random_rows",
          "rows must be within the table");
  const Copy copy = choose_copy();
  const std::vector<int> cores = usable_cores();
  side_by_side(threads, [&](int t) {
    pin(cores[size_t(t) % cores.size()]);
    copy(table, row_bytes, rows, count * t / threads, count * (t + 1) / threads, out, ahead);
  });
}

Reads direct_reads(const std::string& path, const int64_t* offsets, const int64_t* sizes, int64_t count, int threads) {
  require(threads >= 1, "direct_reads", "threads must be at least 1");
  Reads found;
  int64_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    require(offsets[i] >= 0 && sizes[i] >= 0 && offsets[i] % kBlock == 0 && sizes[i] % kBlock == 0, "direct_reads",
            "offsets and sizes must be multiples of 4096");
    largest = std::max(largest, sizes[i]), found.bytes += sizes[i];
  }
  const File file(path);
  std::vector<std::unique_ptr<Reader>> readers;
  for (int t = 0; t < threads; ++t) readers.push_back(std::make_unique<Reader>(file.fd, largest));
  std::atomic<int64_t> next{0};
  std::atomic<uint64_t> mark{0};
  std::mutex mutex;
  std::string error;
  found.seconds = side_by_side(threads, [&](int t) {
    uint64_t own = 0;
    try {
      for (int64_t i; (i = next++) < count;) own ^= readers[t]->read(offsets[i], sizes[i]);
    } catch (const std::runtime_error& e) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = e.what();
    }
    mark ^= own;
  });
  if (!error.empty()) throw std::runtime_error(error);
  found.mark = mark;
  return found;
}

}  // namespace memkernels::host
